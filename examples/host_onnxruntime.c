/* Runs an exported file in ONNX Runtime with our kernels, from C. Build and run:
 *
 *   python -c "import quincunx as qx; print(qx.onnxruntime.quincunx_library())"           # PATH of libquincunx_ort.so
 *   cc -O2 -I<onnxruntime>/include examples/host_onnxruntime.c -L<onnxruntime>/lib -lonnxruntime -o host_onnxruntime
 *   ./host_onnxruntime model.onnx PATH THREADS INPUT OUTPUT N C H W VALUES < input.f32 > output.f32
 *
 * INPUT and OUTPUT are names in the graph, N C H W is the shape of the input, VALUES the number that the output has. */
#include <onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static const OrtApi* api;

static void check(OrtStatus* status) {
  if (status == NULL) return;
  fprintf(stderr, "%s\n", api->GetErrorMessage(status));
  exit(1);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

int main(int argc, char** argv) {
  if (argc != 11) return fprintf(stderr, "host_onnxruntime MODEL LIBRARY THREADS INPUT OUTPUT N C H W VALUES\n"), 1;
  api = OrtGetApiBase()->GetApi(17);
  if (api == NULL) return fprintf(stderr, "ONNX Runtime 1.17 or later is needed\n"), 1;
  OrtEnv* env;
  OrtSessionOptions* options;
  OrtSession* session;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "host", &env));
  check(api->CreateSessionOptions(&options));
  check(api->SetIntraOpNumThreads(options, atoi(argv[3])));
  check(api->RegisterCustomOpsLibrary_V2(options, argv[2])); /* this line is what our kernels need */
  check(api->CreateSession(env, argv[1], options, &session));

  int64_t shape[4];
  size_t values = 1;
  for (int i = 0; i < 4; ++i) values *= (size_t)(shape[i] = atoll(argv[6 + i]));
  float* x = malloc(values * sizeof(float));
  if (x == NULL || fread(x, sizeof(float), values, stdin) != values) return fprintf(stderr, "the input is too short\n"), 1;
  OrtMemoryInfo* memory;
  OrtValue* input;
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  check(api->CreateTensorWithDataAsOrtValue(memory, x, values * sizeof(float), shape, 4,
                                            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &input));

  const char *inputs[] = {argv[4]}, *outputs[] = {argv[5]};
  OrtValue* output = NULL;
  double best = 1e9;
  for (int i = 0; i < 20; ++i) {
    if (output != NULL) api->ReleaseValue(output);
    output = NULL;
    const double start = now();
    check(api->Run(session, NULL, inputs, (const OrtValue* const*)&input, 1, outputs, 1, &output));
    if (now() - start < best) best = now() - start;
  }
  fprintf(stderr, "ONNX Runtime %s, %s threads: %.3f ms\n", OrtGetApiBase()->GetVersionString(), argv[3], 1000 * best);

  void* y;
  check(api->GetTensorMutableData(output, &y));
  fwrite(y, sizeof(float), (size_t)atoll(argv[10]), stdout);
  api->ReleaseValue(output);
  api->ReleaseValue(input);
  api->ReleaseMemoryInfo(memory);
  api->ReleaseSession(session);
  api->ReleaseSessionOptions(options);
  api->ReleaseEnv(env);
  free(x);
  return 0;
}
