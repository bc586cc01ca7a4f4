/* Runs fused programs of quincunx without Python and without PyTorch: the C interface of libquincunx.
 *
 *   qx_program* program;
 *   if (qx_load_file("block.quincunx", &program) != QX_OK) { puts(qx_error()); return 1; }
 *   qx_map in = {x, x_bytes, QX_FLOAT32, QX_NCHW}, out = {y, y_bytes, QX_FLOAT32, QX_NCHW};
 *   if (qx_run(program, NULL, batch, &in, 1, &out, 1) != QX_OK) { puts(qx_error()); return 1; }
 *   qx_free(program);
 *
 * All functions may be called from several threads at the same time, also with one program, except that a program
 * and threads must not be freed while they are used. Functions that return an int return QX_OK or a QX_ code; then
 * qx_error() has a sentence that says why. QUINCUNX_ISA forces an instruction set. */
#ifndef QUINCUNX_H
#define QUINCUNX_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define QX_API __declspec(dllexport)
#else
#define QX_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* raised when a function or a structure of this header changes */
#define QX_ABI_VERSION 1

enum { QX_OK = 0, QX_INVALID = 1, QX_FILE = 2, QX_FAILED = 3 };
enum { QX_FLOAT32 = 0, QX_BFLOAT16 = 1 };
/* planes of one channel behind each other, as torch, ONNX Runtime and OpenVINO have maps; or a position's channels
 * behind each other, which saves a copy */
enum { QX_NCHW = 0, QX_NHWC = 1 };

typedef struct qx_program qx_program;

/* One image of a map is [channels, height, width]; of rank 2, [channels]. */
typedef struct qx_shape {
  int64_t channels, height, width;
  int64_t rank; /* 4 for [N, C, H, W], 2 for [N, C] */
} qx_shape;

/* Memory of the caller. `bytes` must be what the batch needs: batch * channels * height * width values. */
typedef struct qx_map {
  void* data;
  size_t bytes;
  int32_t dtype;
  int32_t layout;
} qx_map;

/* Who computes: parallel_for calls body(argument, i) once for each i of [0, count), in any order and perhaps at the
 * same time, and returns when all have returned. Without parallel_for, and with NULL for the host, the calling
 * thread computes alone. */
typedef struct qx_host {
  int64_t threads;
  void* context;
  void (*parallel_for)(void* context, int64_t count, void (*body)(void* argument, int64_t index), void* argument);
} qx_host;

QX_API int qx_abi_version(void);
/* the instruction set of the kernels: avx512, avx2, ...; NULL if QUINCUNX_ISA forces one that is not there */
QX_API const char* qx_isa(void);
/* why the last call of this thread failed; empty if none did */
QX_API const char* qx_error(void);

/* Reads a program; the bytes may be freed afterwards. *program is NULL on failure. */
QX_API int qx_load(const void* bytes, size_t size, qx_program** program);
QX_API int qx_load_file(const char* path, qx_program** program);
QX_API void qx_free(qx_program* program);

QX_API size_t qx_inputs(const qx_program* program);
QX_API size_t qx_outputs(const qx_program* program);
QX_API int qx_input_shape(const qx_program* program, size_t number, qx_shape* shape);
QX_API int qx_output_shape(const qx_program* program, size_t number, qx_shape* shape);
/* the type that the program computes in, in eight bits the type of its real numbers; maps may have either type */
QX_API int32_t qx_dtype(const qx_program* program);
/* bytes that the program holds: tables and packed weights */
QX_API int64_t qx_memory(const qx_program* program);

/* Inputs are read and never written; outputs must overlap neither inputs nor each other. */
QX_API int qx_run(const qx_program* program, const qx_host* host, int64_t batch, const qx_map* inputs,
                  size_t input_count, const qx_map* outputs, size_t output_count);

/* Threads for programs that have no engine with its own: `count` of them, the caller's included. A second call at the
 * same time computes on its own thread alone. After a fork the child starts its own. */
QX_API int qx_threads(int64_t count, qx_host** host);
QX_API void qx_free_threads(qx_host* host);

#ifdef __cplusplus
}
#endif
#endif
