/* A CUDA runtime without a GPU: host memory stands in for the device's, and streams do their work at once. Enough of it
 * for PyTorch's own caching allocator (libc10_cuda.so) to run, so that the wrapper is tested against the real one.
 *
 * `stub_capacity` bytes there are, `stub_mallocs` counts cudaMalloc, and events are done while `stub_events_done`. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, NOT_READY = 600 };

size_t stub_capacity = (size_t)256 << 20, stub_used = 0;
long stub_mallocs = 0;
int stub_events_done = 1;

static struct { void* at; size_t size; } blocks[4096];

int cudaMalloc(void** out, size_t size) {
  ++stub_mallocs;
  if (stub_used + size > stub_capacity) return OUT_OF_MEMORY;
  if (posix_memalign(out, 1 << 21, size) != 0) return OUT_OF_MEMORY;
  for (size_t i = 0; i < 4096; ++i) {
    if (blocks[i].at != NULL) continue;
    blocks[i].at = *out;
    blocks[i].size = size;
    break;
  }
  stub_used += size;
  return SUCCESS;
}

int cudaFree(void* at) {
  for (size_t i = 0; i < 4096; ++i) {
    if (at == NULL || blocks[i].at != at) continue;
    stub_used -= blocks[i].size;
    blocks[i].at = NULL;
  }
  free(at);
  return SUCCESS;
}

int cudaMemGetInfo(size_t* available, size_t* total) {
  *available = stub_capacity - stub_used;
  *total = stub_capacity;
  return SUCCESS;
}

int cudaGetDevice(int* device) { return *device = 0, SUCCESS; }
int cudaGetDeviceCount(int* count) { return *count = 1, SUCCESS; }
int cudaEventCreateWithFlags(void** event, unsigned flags) { (void)flags; return *event = malloc(1), SUCCESS; }
int cudaEventDestroy(void* event) { free(event); return SUCCESS; }
int cudaEventQuery(void* event) { (void)event; return stub_events_done ? SUCCESS : NOT_READY; }
int cudaMemsetAsync(void* at, int value, size_t size, void* stream) { (void)stream; memset(at, value, size); return 0; }
int cudaStreamIsCapturing(void* stream, int* status) { (void)stream; return *status = 0, SUCCESS; }
int cudaStreamGetCaptureInfo(void* stream, int* status) { (void)stream; return *status = 0, SUCCESS; }
int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = 0, SUCCESS; }
int cudaStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
  (void)flags, (void)priority;
  return *stream = malloc(1), SUCCESS;
}
int cudaGetDeviceProperties(void* properties, int device) {
  (void)device;
  memset(properties, 0, 64);
  return SUCCESS;
}
const char* cudaGetErrorString(int error) { (void)error; return "an error of the stub"; }
const char* cudaGetErrorName(int error) { (void)error; return "stub"; }

#define SUCCEEDS(name) int name() { return SUCCESS; }
SUCCEEDS(cudaGetLastError) SUCCEEDS(cudaSetDevice) SUCCEEDS(cudaDeviceSynchronize) SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventSynchronize) SUCCEEDS(cudaEventElapsedTime) SUCCEEDS(cudaStreamQuery) SUCCEEDS(cudaStreamSynchronize)
SUCCEEDS(cudaStreamWaitEvent) SUCCEEDS(cudaThreadExchangeStreamCaptureMode) SUCCEEDS(cudaDriverGetVersion)

#define FAILS(name) int name() { return 801; } /* not supported */
FAILS(cudaDeviceCanAccessPeer) FAILS(cudaDeviceEnablePeerAccess) FAILS(cudaDeviceGetDefaultMemPool)
FAILS(cudaFreeAsync) FAILS(cudaGetDriverEntryPointByVersion) FAILS(cudaGetDriverEntryPoint)
FAILS(cudaGraphNodeGetDependencies) FAILS(cudaIpcCloseMemHandle) FAILS(cudaIpcGetMemHandle) FAILS(cudaIpcOpenMemHandle)
FAILS(cudaMallocAsync) FAILS(cudaMemPoolGetAttribute) FAILS(cudaMemPoolSetAccess) FAILS(cudaMemPoolSetAttribute)
FAILS(cudaMemPoolTrimTo) FAILS(cudaMemcpy) FAILS(cudaMemcpyAsync) FAILS(cudaMemcpyPeerAsync)
