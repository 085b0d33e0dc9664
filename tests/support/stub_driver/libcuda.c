// A stub of the CUDA driver (libcuda.so.1) for machines without a GPU.
//
// Triton's own binder, compiler and C launcher run on it unchanged. Loading a binary reads the
// sizes of its kernels' parameters from its ELF sections, as the driver does. A launch runs
// nothing: it is checked against the card's limits and recorded, with every parameter's value.
//
// Only what Triton's driver.c is linked against is here. The device's memory is the host's: a
// tensor's address is passed on as it is. The stub is for one thread.

#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MOST_PARAMETERS 128
#define MOST_NAME 128

// Of one kernel: how the launcher must pass its parameters.
typedef struct {
  char name[MOST_NAME];
  int32_t parameters;
  int32_t sizes[MOST_PARAMETERS];
} Kernel;

// One call of cuLaunchKernelEx. stub_driver/__init__.py has the same layout.
typedef struct {
  Kernel kernel;
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared;
  uint32_t padding;
  uint64_t stream;
  uint64_t values[MOST_PARAMETERS];
} Launch;

static Launch *launches = NULL;
static long recorded = 0, capacity = 0;

// The card: an H100 until stub_card says otherwise.
static int major_version = 9, minor_version = 0, shared_limit = 227 * 1024;

EXPORT void stub_card(int major, int minor, int shared) {
  major_version = major;
  minor_version = minor;
  shared_limit = shared;
}

EXPORT long stub_recorded(void) { return recorded; }
EXPORT const Launch *stub_launch(long index) { return &launches[index]; }
EXPORT void stub_forget(void) { recorded = 0; }
EXPORT int stub_launch_size(void) { return sizeof(Launch); }

// ---- Devices and contexts ----

static int context;  // its address is the only context

EXPORT CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }

EXPORT CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = major_version; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = minor_version; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_limit; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = shared_limit + 1024;  // one KiB is the system's
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 1; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *result, CUdevice device) {
  *result = (CUcontext)&context;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *result) {
  *result = (CUcontext)&context;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext given) { return CUDA_SUCCESS; }

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

EXPORT CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute,
                                      CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_IMAGE ? "the stub finds no such kernel in the binary"
                                            : "the stub refuses a value";
  return CUDA_SUCCESS;
}

// ---- Binaries ----

// In a section .nv.info.<kernel>: entries of a format, an attribute and a size in bytes, and then
// so many bytes. This attribute describes one parameter: its index, its number, its offset, and
// flags whose upper 14 bits are its size.
#define FORMAT_SIZED 0x04
#define ATTRIBUTE_PARAMETER 0x17

static int read_parameters(Kernel *kernel, const uint8_t *at, const uint8_t *end) {
  while (at + 4 <= end) {
    uint8_t format = at[0], attribute = at[1];
    uint16_t size;
    memcpy(&size, at + 2, sizeof size);
    at += 4;
    if (format != FORMAT_SIZED) continue;  // its value is where the size would be
    if (at + size > end) return 0;
    if (attribute == ATTRIBUTE_PARAMETER && size >= 12) {
      uint16_t number;
      uint32_t flags;
      memcpy(&number, at + 4, sizeof number);
      memcpy(&flags, at + 8, sizeof flags);
      if (number >= MOST_PARAMETERS) return 0;
      kernel->sizes[number] = flags >> 18;
      if (number >= kernel->parameters) kernel->parameters = number + 1;
    }
    at += size;
  }
  return kernel->parameters > 0;
}

// A module is the binary, which Triton keeps for as long as the module is loaded.
EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (memcmp(image, ELFMAG, SELFMAG) != 0) return CUDA_ERROR_INVALID_IMAGE;
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  const uint8_t *image = (const uint8_t *)module;
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  const char *names = (const char *)image + sections[header->e_shstrndx].sh_offset;
  const char prefix[] = ".nv.info.";
  for (int i = 0; i < header->e_shnum; i++) {
    const char *section = names + sections[i].sh_name;
    if (strncmp(section, prefix, sizeof prefix - 1) != 0) continue;
    if (strcmp(section + sizeof prefix - 1, name) != 0) continue;
    Kernel *kernel = calloc(1, sizeof(Kernel));
    if (kernel == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    strncpy(kernel->name, name, MOST_NAME - 1);
    const uint8_t *start = image + sections[i].sh_offset;
    if (!read_parameters(kernel, start, start + sections[i].sh_size)) {
      free(kernel);
      return CUDA_ERROR_INVALID_IMAGE;
    }
    *function = (CUfunction)kernel;  // kept: kernels are few, and the process is short
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_INVALID_IMAGE;
}

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute,
                                   CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  return CUDA_SUCCESS;
}

// ---- Launches ----

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function,
                                 void **parameters, void **extra) {
  const Kernel *kernel = (const Kernel *)function;
  uint64_t threads = (uint64_t)config->blockDimX * config->blockDimY * config->blockDimZ;
  uint64_t programs = (uint64_t)config->gridDimX * config->gridDimY * config->gridDimZ;
  if (programs == 0 || threads == 0 || threads > 1024 || config->gridDimX > INT32_MAX ||
      config->gridDimY > 65535 || config->gridDimZ > 65535 ||
      config->sharedMemBytes > (unsigned)shared_limit)
    return CUDA_ERROR_INVALID_VALUE;
  if (recorded == capacity) {
    capacity = capacity ? 2 * capacity : 256;
    launches = realloc(launches, capacity * sizeof(Launch));
    if (launches == NULL) abort();
  }
  Launch *launch = &launches[recorded++];
  memset(launch, 0, sizeof *launch);
  launch->kernel = *kernel;
  memcpy(launch->grid, &config->gridDimX, sizeof launch->grid);
  memcpy(launch->block, &config->blockDimX, sizeof launch->block);
  launch->shared = config->sharedMemBytes;
  launch->stream = (uint64_t)config->hStream;
  for (int i = 0; i < kernel->parameters; i++) {
    if (kernel->sizes[i] > (int)sizeof launch->values[i]) return CUDA_ERROR_INVALID_VALUE;
    memcpy(&launch->values[i], parameters[i], kernel->sizes[i]);
  }
  return CUDA_SUCCESS;
}
