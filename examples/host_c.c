/* Runs a program of quincunx from C, without Python, PyTorch or an engine. Build and run:
 *
 *   python -c "import quincunx.ops.libraries as l; print(l.library_path('quincunx'))"     # PATH of libquincunx.so
 *   cc -O2 -Icsrc/capi examples/host_c.c PATH -Wl,-rpath,$(dirname PATH) -o host_c
 *   ./host_c program.quincunx BATCH THREADS < inputs.f32 > outputs.f32
 *
 * The program is what quincunx.fusion.serialise.program_bytes returned; maps are float32 [N, C, H, W], one behind the
 * other. */
#include <quincunx.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static int fail(const char* what) {
  fprintf(stderr, "%s\n", what);
  return 1;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

int main(int argc, char** argv) {
  if (argc != 4) return fail("host_c PROGRAM BATCH THREADS");
  qx_program* program;
  if (qx_load_file(argv[1], &program) != QX_OK) return fail(qx_error());
  qx_host* threads;
  if (qx_threads(atoi(argv[3]), &threads) != QX_OK) return fail(qx_error());

  const int64_t batch = atoll(argv[2]);
  const size_t count[2] = {qx_inputs(program), qx_outputs(program)};
  qx_map* maps[2];
  for (int out = 0; out < 2; ++out) {
    maps[out] = calloc(count[out], sizeof(qx_map));
    for (size_t i = 0; i < count[out]; ++i) {
      qx_shape s;
      if ((out ? qx_output_shape : qx_input_shape)(program, i, &s) != QX_OK) return fail(qx_error());
      const size_t bytes = (size_t)(batch * s.channels * s.height * s.width) * sizeof(float);
      qx_map map = {malloc(bytes), bytes, QX_FLOAT32, QX_NCHW};
      if (map.data == NULL) return fail("not enough memory");
      if (!out && fread(map.data, 1, bytes, stdin) != bytes) return fail("the inputs are too short");
      maps[out][i] = map;
    }
  }

  double best = 1e9;
  for (int i = 0; i < 20; ++i) {
    const double start = now();
    if (qx_run(program, threads, batch, maps[0], count[0], maps[1], count[1]) != QX_OK) return fail(qx_error());
    if (now() - start < best) best = now() - start;
  }
  fprintf(stderr, "%s, %s threads: %.3f ms\n", qx_isa(), argv[3], 1000 * best);

  for (size_t i = 0; i < count[1]; ++i) fwrite(maps[1][i].data, 1, maps[1][i].bytes, stdout);
  for (int out = 0; out < 2; ++out) {
    for (size_t i = 0; i < count[out]; ++i) free(maps[out][i].data);
    free(maps[out]);
  }
  qx_free_threads(threads);
  qx_free(program);
  return 0;
}
