// The facts of ONNX Runtime's C interface that the operator uses, so that it builds without ONNX Runtime's headers:
// the slots of the functions in the table that the library hands out, and the fields of a custom operator. The
// interface only grows at its end, so the slots hold for every release from kOrtApi on. Names are those of
// onnxruntime_c_api.h; a test compares every place with that header where it is installed.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// of release 1.17, the first with KernelContext_ParallelFor
enum { kOrtApi = 17 };

typedef enum { ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2 } ONNXTensorElementDataType;
typedef enum { INPUT_OUTPUT_REQUIRED = 0, INPUT_OUTPUT_OPTIONAL = 1, INPUT_OUTPUT_VARIADIC = 2 } OrtCustomOpInputOutputCharacteristic;
typedef enum { ORT_OK = 0, ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_INVALID_GRAPH = 10 } OrtErrorCode;
typedef enum { OrtArenaAllocator = 1 } OrtAllocatorType;
typedef enum { OrtMemTypeDefault = 0 } OrtMemType;
typedef enum { ORT_LOGGING_LEVEL_WARNING = 2 } OrtLoggingLevel;

typedef struct OrtStatus OrtStatus;
typedef OrtStatus* OrtStatusPtr;
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtCustomOp OrtCustomOp;
typedef struct OrtApi OrtApi;

typedef struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)(void);
} OrtApiBase;

// a number of functions that are not used here
#define QX_UNUSED(first, next) void* unused_##first[next - first]
struct OrtApi {
  OrtStatusPtr (*CreateStatus)(OrtErrorCode code, const char* message);  // slot 0
  QX_UNUSED(1, 2);
  const char* (*GetErrorMessage)(const OrtStatus*);  // 2
  OrtStatusPtr (*CreateEnv)(OrtLoggingLevel, const char* name, OrtEnv**);  // 3
  QX_UNUSED(4, 7);
  OrtStatusPtr (*CreateSession)(const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession**);  // 7
  QX_UNUSED(8, 9);
  OrtStatusPtr (*Run)(OrtSession*, const OrtRunOptions*, const char* const* input_names, const OrtValue* const* inputs,
                      size_t input_count, const char* const* output_names, size_t output_count, OrtValue** outputs);  // 9
  OrtStatusPtr (*CreateSessionOptions)(OrtSessionOptions**);  // 10
  QX_UNUSED(11, 24);
  OrtStatusPtr (*SetIntraOpNumThreads)(OrtSessionOptions*, int);  // 24
  QX_UNUSED(25, 26);
  OrtStatusPtr (*CreateCustomOpDomain)(const char* domain, OrtCustomOpDomain**);                   // 26
  OrtStatusPtr (*CustomOpDomain_Add)(OrtCustomOpDomain*, const OrtCustomOp*);                      // 27
  OrtStatusPtr (*AddCustomOpDomain)(OrtSessionOptions*, OrtCustomOpDomain*);                       // 28
  QX_UNUSED(29, 49);
  OrtStatusPtr (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void* data, size_t bytes, const int64_t* shape,
                                                 size_t rank, ONNXTensorElementDataType, OrtValue**);  // 49
  QX_UNUSED(50, 51);
  OrtStatusPtr (*GetTensorMutableData)(OrtValue*, void** data);  // 51
  QX_UNUSED(52, 60);
  OrtStatusPtr (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType*);  // 60
  OrtStatusPtr (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, size_t*);                       // 61
  OrtStatusPtr (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t);                   // 62
  QX_UNUSED(63, 64);
  OrtStatusPtr (*GetTensorShapeElementCount)(const OrtTensorTypeAndShapeInfo*, size_t*);  // 64
  OrtStatusPtr (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);    // 65
  QX_UNUSED(66, 69);
  OrtStatusPtr (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**);  // 69
  QX_UNUSED(70, 88);
  OrtStatusPtr (*KernelContext_GetInputCount)(const OrtKernelContext*, size_t*);                    // 88
  OrtStatusPtr (*KernelContext_GetOutputCount)(const OrtKernelContext*, size_t*);                   // 89
  OrtStatusPtr (*KernelContext_GetInput)(const OrtKernelContext*, size_t, const OrtValue**);        // 90
  OrtStatusPtr (*KernelContext_GetOutput)(OrtKernelContext*, size_t, const int64_t* shape, size_t rank, OrtValue**);  // 91
  void (*ReleaseEnv)(OrtEnv*);                // 92
  void (*ReleaseStatus)(OrtStatus*);          // 93
  void (*ReleaseMemoryInfo)(OrtMemoryInfo*);  // 94
  void (*ReleaseSession)(OrtSession*);        // 95
  void (*ReleaseValue)(OrtValue*);  // 96
  QX_UNUSED(97, 99);
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);  // 99
  void (*ReleaseSessionOptions)(OrtSessionOptions*);  // 100
  void (*ReleaseCustomOpDomain)(OrtCustomOpDomain*);  // 101
  QX_UNUSED(102, 228);
  OrtStatusPtr (*RegisterCustomOpsLibrary_V2)(OrtSessionOptions*, const char* path);  // 228
  QX_UNUSED(229, 230);
  OrtStatusPtr (*KernelInfo_GetInputCount)(const OrtKernelInfo*, size_t*);   // 230
  OrtStatusPtr (*KernelInfo_GetOutputCount)(const OrtKernelInfo*, size_t*);  // 231
  QX_UNUSED(232, 249);
  OrtStatusPtr (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo*, size_t, int* is_constant, const OrtValue**);  // 249
  QX_UNUSED(250, 274);
  OrtStatusPtr (*KernelContext_ParallelFor)(const OrtKernelContext*, void (*body)(void*, size_t), size_t total,
                                            size_t batches, void* argument);  // 274
};
#undef QX_UNUSED

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  OrtMemType (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatusPtr (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatusPtr (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatusPtr (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};

// of libonnxruntime, for programs that link it
const OrtApiBase* OrtGetApiBase(void);

#ifdef __cplusplus
}
#endif
