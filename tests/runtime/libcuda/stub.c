// A CUDA driver with two devices that runs nothing and keeps every launch that arrives, to test what Triton's launcher
// makes of its arguments. It refuses what a driver refuses: a kernel of another device's context, a grid or shared
// memory beyond the limits. An image is PTX, where a kernel's parameters are found.
//
// The functions are those that any Triton from 3.5 to 3.9 links to. cuda.h is the one in Triton's wheel.

#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { DEVICES = 2, MOST_PARAMETERS = 96, MOST_LAUNCHES = 256, MOST_FUNCTIONS = 1024, NAME = 64 };
enum { STATIC_LIMIT = 48 << 10, SHARED_LIMIT = 227 << 10, MOST_Y = 65535 };

struct CUctx_st {
  int device;
};

struct CUmod_st {
  CUcontext context;
  char* image;
};

struct CUfunc_st {
  CUcontext context;
  char name[NAME];
  int shared_limit;
  int parameters;
  int sizes[MOST_PARAMETERS];
};

// One launch. device: whose context was current; values: parameters, the bytes beyond their size 0.
typedef struct {
  uint32_t grid[3], block[3], shared, attributes;
  int32_t device, parameters;
  uint64_t stream, function;
  int32_t sizes[MOST_PARAMETERS];
  uint64_t values[MOST_PARAMETERS];
  char name[NAME];
} Launch;

static struct CUctx_st contexts[DEVICES] = {{0}, {1}};
static struct CUfunc_st functions[MOST_FUNCTIONS];
static int n_functions;
static Launch launches[MOST_LAUNCHES];
static int n_launches;
static _Thread_local CUcontext current;

// What the test asks.

int stub_launches(const Launch** first) {
  *first = launches;
  return n_launches;
}

void stub_clear(void) { n_launches = 0; }

int stub_device(void) { return current ? current->device : -1; }

void stub_set_device(int device) { current = &contexts[device]; }

// What Triton asks.

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  switch (error) {
    case CUDA_ERROR_INVALID_VALUE:
      *text = "invalid argument";
      break;
    case CUDA_ERROR_INVALID_CONTEXT:
      *text = "invalid device context";
      break;
    case CUDA_ERROR_INVALID_HANDLE:
      *text = "invalid resource handle";
      break;
    default:
      *text = "not done by the stub";
  }
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  *count = DEVICES;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal < DEVICES ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = 9;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = 0;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = SHARED_LIMIT;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 132;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    default:
      *value = 1024;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = &contexts[device];
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current ? current->device : 0;
  return current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  *module = malloc(sizeof **module);
  (*module)->context = current;
  (*module)->image = strdup(image);
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  free(module->image);
  free(module);
  return CUDA_SUCCESS;
}

// Bytes of a parameter whose type stands at `type`, such as ".u64 .ptr .global"; 0 for what no kernel here has.
static int size_of(const char* type) {
  static const char digits[] = "0123456789";
  if (*type++ != '.' || !strchr("usbf", *type)) return 0;
  type++;
  return strspn(type, digits) ? atoi(type) / 8 : 0;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  char entry[NAME + 16] = ".entry ";
  if (strlen(name) >= NAME || n_functions == MOST_FUNCTIONS) return CUDA_ERROR_INVALID_VALUE;
  strcat(entry, name);
  const char* at = strstr(module->image, strcat(entry, "("));
  if (!at) return CUDA_ERROR_NOT_FOUND;
  CUfunction found = &functions[n_functions];
  memset(found, 0, sizeof *found);
  strcpy(found->name, name);
  found->context = module->context;
  found->shared_limit = STATIC_LIMIT;
  const char* end = strchr(at, ')');
  while ((at = strstr(at, ".param ")) && at < end) {
    at += strlen(".param ");
    int size = size_of(at);
    if (!size || found->parameters == MOST_PARAMETERS) return CUDA_ERROR_INVALID_IMAGE;
    found->sizes[found->parameters++] = size;
  }
  n_functions++;
  *function = found;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > SHARED_LIMIT)
    return CUDA_ERROR_INVALID_VALUE;
  function->shared_limit = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  if (function < functions || function >= functions + n_functions || function->context != current)
    return CUDA_ERROR_INVALID_HANDLE;
  uint32_t grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  uint32_t block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > INT32_MAX || grid[1] > MOST_Y || grid[2] > MOST_Y ||
      config->sharedMemBytes > (unsigned)function->shared_limit || n_launches == MOST_LAUNCHES)
    return CUDA_ERROR_INVALID_VALUE;
  Launch* launch = &launches[n_launches++];
  memset(launch, 0, sizeof *launch);
  memcpy(launch->grid, grid, sizeof grid);
  memcpy(launch->block, block, sizeof block);
  launch->shared = config->sharedMemBytes;
  launch->attributes = config->numAttrs;
  launch->device = current->device;
  launch->stream = (uint64_t)config->hStream;
  launch->function = (uint64_t)function;
  launch->parameters = function->parameters;
  memcpy(launch->sizes, function->sizes, sizeof launch->sizes);
  memcpy(launch->name, function->name, NAME);
  for (int i = 0; i < function->parameters; i++) memcpy(&launch->values[i], parameters[i], function->sizes[i]);
  return CUDA_SUCCESS;
}

// Linked to, and never called for these kernels.

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* config) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
