// A CUDA runtime without a card. Kernels do nothing, memory is address space that is never touched, and everything that
// asks is told about a card of NULL_TOTAL bytes and compute capability NULL_CC. Results mean nothing: what is copied to
// the host is zero, or true where it is one byte (which is how "are all of them finite?" comes back).
//
// The functions of which nothing is asked but success are in runtime_nothing.c.

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "null_gpu.h"

#undef cudaGetDeviceProperties

long null_launches, null_copies, null_fills, null_uploads, null_downloads, null_synchronizations;
long null_convolutions, null_products;
long null_total = 80L << 30, null_torch, null_context, null_outside, null_other, null_most, null_refuse;
int null_major = 8, null_minor = 6;

static const long CONTEXT = 450000000;

static long number(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text ? atol(text) : otherwise;
}

__attribute__((constructor)) static void begin(void) {
  long capability = number("NULL_CC", 86);
  null_major = capability / 10, null_minor = capability % 10;
  null_total = number("NULL_TOTAL", null_total);
  null_other = number("NULL_OTHER", 0);
}

// Memory

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static long held(void) { return null_torch + null_context + null_outside; }

long null_free(void) {
  long free = null_total - null_other - held();
  return free > 0 ? free : 0;
}

// Whether the card has so many bytes; they are torch's then.
static int take(size_t bytes) {
  pthread_mutex_lock(&lock);
  null_context = CONTEXT;  // whoever takes memory has one
  int given = !null_refuse && (long)bytes <= null_free();
  if (given) null_torch += bytes;
  if (held() > null_most) null_most = held();
  pthread_mutex_unlock(&lock);
  return given;
}

static void give(size_t bytes) {
  pthread_mutex_lock(&lock);
  null_torch -= bytes;
  pthread_mutex_unlock(&lock);
}

static void* reserve(size_t bytes) {
  void* pages = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return pages == MAP_FAILED ? NULL : pages;
}

typedef struct Block {
  void* pages;
  size_t bytes;
  struct Block* next;
} Block;
static Block* blocks;

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = NULL;
  if (!take(bytes)) return cudaErrorMemoryAllocation;
  Block* block = malloc(sizeof(Block));
  pthread_mutex_lock(&lock);
  *block = (Block){reserve(bytes), bytes, blocks};
  blocks = block;
  pthread_mutex_unlock(&lock);
  *pointer = block->pages;
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  pthread_mutex_lock(&lock);
  Block** at = &blocks;
  while (*at && (*at)->pages != pointer) at = &(*at)->next;
  Block* block = pointer ? *at : NULL;
  if (block) *at = block->next;
  pthread_mutex_unlock(&lock);
  if (block) {
    munmap(block->pages, block->bytes);
    give(block->bytes);
    free(block);
  }
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t stream) { return cudaMalloc(pointer, bytes); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) { return cudaFree(pointer); }

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags) {
  *pointer = malloc(bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* pointer) {
  free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = null_free(), *total = null_total;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeDevice;
  attributes->devicePointer = (void*)pointer;
  return cudaSuccess;
}

static char symbol[4096];
cudaError_t cudaGetSymbolAddress(void** pointer, const void* name) {
  *pointer = symbol;
  return cudaSuccess;
}

// Expandable segments: torch takes these of the driver's functions through the runtime.

static int unasked(void) { return 0; }

static int address_reserve(unsigned long long* pointer, size_t bytes, size_t align, unsigned long long at,
                           unsigned long long flags) {
  *pointer = (unsigned long long)(uintptr_t)reserve(bytes);
  return *pointer ? 0 : 2;
}
static int address_free(unsigned long long pointer, size_t bytes) {
  munmap((void*)(uintptr_t)pointer, bytes);
  return 0;
}
static int mem_create(unsigned long long* handle, size_t bytes, const void* properties, unsigned long long flags) {
  *handle = bytes;
  return take(bytes) ? 0 : 2;
}
// Memory is the card's again when its handle is released, which torch does after unmapping it, and at once where it
// could not make all that it wanted to map.
static int mem_release(unsigned long long handle) {
  give(handle);
  return 0;
}
static int granularity(size_t* bytes, const void* properties, int option) {
  *bytes = 2 << 20;
  return 0;
}
static int error_string(int error, const char** text) {
  *text = "an error of the null GPU";
  return 0;
}
static int device_attribute(int* value, int attribute, int device) {
  *value = attribute == 16 ? 82 : attribute == 75 ? null_major : attribute == 76 ? null_minor : 1;
  return 0;
}
static int context_state(int device, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  *active = null_context > 0;
  return 0;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult* result) {
  static const struct {
    const char* name;
    void* function;
  } known[] = {
      {"cuMemAddressReserve", address_reserve},
      {"cuMemAddressFree", address_free},
      {"cuMemCreate", mem_create},
      {"cuMemRelease", mem_release},
      {"cuMemGetAllocationGranularity", granularity},
      {"cuGetErrorString", error_string},
      {"cuDeviceGetAttribute", device_attribute},
      {"cuDevicePrimaryCtxGetState", context_state},
  };
  *function = unasked;
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (!strcmp(name, known[i].name)) *function = known[i].function;
  if (result) *result = 0;
  return cudaSuccess;
}

// Copies

static void copy(void* target, const void* source, size_t bytes, enum cudaMemcpyKind kind) {
  if (kind == cudaMemcpyHostToDevice) {
    null_uploads++;
  } else if (kind == cudaMemcpyDeviceToHost) {
    null_downloads++;
    memset(target, bytes == 1, bytes);
  } else {
    null_copies++;
  }
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  copy(target, source, bytes, kind);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, enum cudaMemcpyKind kind) {
  null_synchronizations++;
  copy(target, source, bytes, kind);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  null_fills++;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  null_fills++;
  return cudaSuccess;
}

// Kernels

static __thread struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configured;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configured.grid = grid, configured.block = block, configured.shared = shared, configured.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configured.grid, *block = configured.block, *shared = configured.shared, *(void**)stream = configured.stream;
  return cudaSuccess;
}
void** __cudaRegisterFatBinary(void* binary) {
  static void* handle;
  return &handle;
}
char __cudaInitModule(void** handle) { return 1; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  null_launches++;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  null_launches++;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  null_launches++;
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  function(data);
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned flags) {
  callback(stream, cudaSuccess, data);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* function) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 10 * null_major + null_minor;
  attributes->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared) {
  *blocks = 4;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                   size_t shared, unsigned flags) {
  *blocks = 4;
  return cudaSuccess;
}

// Streams and events

static long handles = 0x1000;

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = (cudaStream_t)(handles += 16);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  null_synchronizations++;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
  null_synchronizations++;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  null_synchronizations++;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = (cudaEvent_t)(handles += 16);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = 1;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  if (status) *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}

// The device

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  strncpy(text, "0000:01:00.0", size);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  *pool = (cudaMemPool_t)1;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the null GPU";
}
const char* cudaGetErrorName(cudaError_t error) { return "null"; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* properties, int device) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "Null GPU");
  properties->totalGlobalMem = null_total;
  properties->major = null_major, properties->minor = null_minor;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024, properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = INT32_MAX, properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->multiProcessorCount = 82;  // an RTX 3090's, as what follows
  properties->maxThreadsPerMultiProcessor = 1536, properties->maxBlocksPerMultiProcessor = 16;
  properties->sharedMemPerBlock = 49152, properties->sharedMemPerBlockOptin = 101376;
  properties->sharedMemPerMultiprocessor = 102400;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->l2CacheSize = 6291456;
  properties->unifiedAddressing = properties->canMapHostMemory = properties->concurrentKernels = 1;
  properties->textureAlignment = 512;
  properties->asyncEngineCount = 2;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp properties;
  cudaGetDeviceProperties(&properties, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiProcessorCount;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = properties.maxThreadsPerBlock;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = properties.maxThreadsPerMultiProcessor;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = properties.maxGridSize[0];
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *value = properties.maxGridSize[1];
      break;
    case cudaDevAttrWarpSize:
      *value = properties.warpSize;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = properties.sharedMemPerBlock;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = properties.sharedMemPerBlockOptin;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = properties.sharedMemPerMultiprocessor;
      break;
    default:
      *value = 1;
  }
  return cudaSuccess;
}
