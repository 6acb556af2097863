// Stands in for the NVIDIA driver's library, libcuda.so.1: what CuPy calls of it to load and to launch a kernel.
//
// Modules are the binaries that NVRTC compiled for a GPU, checked as far as their format is public. A launch runs the
// kernel's build for the CPU instead, on the very array of parameter addresses that CuPy has packed.
#include <elf.h>

#include <set>
#include <string>
#include <unordered_map>

#include "cuda_on_cpu.h"

namespace {

// Names and values are those of CUresult in cuda.h.
#define ERRORS(each) \
    each(SUCCESS, 0) each(INVALID_CONTEXT, 201) each(NO_BINARY_FOR_GPU, 209) each(INVALID_HANDLE, 400) \
    each(NOT_FOUND, 500) each(LAUNCH_FAILED, 719)
#define ENUMERATOR(name, value) name = value,
enum Result { ERRORS(ENUMERATOR) };

using RunOnCpu = const char* (*)(dim3 grid, dim3 block, cuda_on_cpu::Order order, void** parameters);

struct Module {
    int device;
    std::set<std::string> kernels;
};

struct Function {
    const Module* module;
    std::string name;
};

std::unordered_map<std::string, RunOnCpu> cpu_builds;
std::string reason;  // of the last error

Result fail(Result result, const std::string& why) {
    reason = why;
    return result;
}

bool is_elf(const char* image) { return memcmp(image, ELFMAG, SELFMAG) == 0; }

// The compute capability that a cubin is compiled for, such as 90; 0 for an ELF file of another kind.
int capability_of(const char* image) {
    const auto& header = *reinterpret_cast<const Elf64_Ehdr*>(image);
    if (header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_machine != EM_CUDA) return 0;
    // NVRTC 13 moved it by a byte, in version 8 of its format.
    return header.e_flags >> (header.e_ident[EI_ABIVERSION] >= 8 ? 8 : 0) & 0xff;
}

std::set<std::string> kernels_of_cubin(const char* image) {
    const auto& header = *reinterpret_cast<const Elf64_Ehdr*>(image);
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + header.e_shoff);
    std::set<std::string> kernels;
    for (const Elf64_Shdr* section = sections; section != sections + header.e_shnum; ++section) {
        if (section->sh_type != SHT_SYMTAB) continue;
        const char* names = image + sections[section->sh_link].sh_offset;
        const auto* symbols = reinterpret_cast<const Elf64_Sym*>(image + section->sh_offset);
        for (size_t i = 0; i < section->sh_size / sizeof *symbols; ++i)
            if (ELF64_ST_TYPE(symbols[i].st_info) == STT_FUNC) kernels.insert(names + symbols[i].st_name);
    }
    return kernels;
}

std::set<std::string> kernels_of_ptx(const std::string& text) {
    const std::string keyword = ".entry ";
    std::set<std::string> kernels;
    for (size_t at = text.find(keyword); at != text.npos; at = text.find(keyword, at + 1)) {
        const size_t name = at + keyword.size();
        kernels.insert(text.substr(name, text.find('(', name) - name));
    }
    return kernels;
}

}  // namespace

extern "C" {

// --- For the test

struct Launch {
    dim3 grid, block;
    unsigned int shared_bytes;
    void* stream;
    int device;
} stand_in_last_launch;

struct Occupancy {
    const char* name;
    int threads;
    size_t shared_bytes;
} stand_in_last_occupancy;

int stand_in_launches;
int stand_in_blocks;           // the answer when asked for occupancy
int stand_in_device = -1;      // whose context is current; -1 for none
int stand_in_capabilities[3];  // of each device

void stand_in_run(const char* name, RunOnCpu cpu_build) { cpu_builds[name] = cpu_build; }

// --- What CuPy calls

int cuGetErrorName(int result, const char** name) {
#define NAME(error, value) \
    if (result == value) *name = "CUDA_ERROR_" #error;
    ERRORS(NAME)
    return SUCCESS;
}

int cuGetErrorString(int, const char** text) {
    *text = reason.c_str();
    return SUCCESS;
}

int cuModuleLoadData(Module** module, const char* image) {
    if (stand_in_device < 0) return fail(INVALID_CONTEXT, "a module is loaded without a context");
    const int capability = stand_in_capabilities[stand_in_device];
    if (is_elf(image) && capability_of(image) != capability)
        return fail(NO_BINARY_FOR_GPU, "this is no cubin for sm_" + std::to_string(capability));
    *module = new Module{stand_in_device, is_elf(image) ? kernels_of_cubin(image) : kernels_of_ptx(image)};
    return SUCCESS;
}

int cuModuleUnload(Module* module) {
    delete module;
    return SUCCESS;
}

int cuModuleGetFunction(Function** function, const Module* module, const char* name) {
    if (!module->kernels.count(name)) return fail(NOT_FOUND, std::string("the module has no kernel ") + name);
    *function = new Function{module, name};
    return SUCCESS;
}

int cuLaunchKernel(
    const Function* function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z, unsigned int block_x,
    unsigned int block_y, unsigned int block_z, unsigned int shared_bytes, void* stream, void** parameters, void**) {
    if (function->module->device != stand_in_device)
        return fail(INVALID_HANDLE, function->name + " was loaded on another device");
    const auto cpu_build = cpu_builds.find(function->name);
    if (cpu_build == cpu_builds.end()) return fail(LAUNCH_FAILED, "there is no build for the CPU of " + function->name);
    const dim3 grid{grid_x, grid_y, grid_z}, block{block_x, block_y, block_z};
    stand_in_last_launch = {grid, block, shared_bytes, stream, stand_in_device};
    ++stand_in_launches;
    const char* error = cpu_build->second(grid, block, cuda_on_cpu::shuffled, parameters);
    return error == nullptr ? SUCCESS : fail(LAUNCH_FAILED, error);
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(
    int* blocks, const Function* function, int threads, size_t shared_bytes) {
    if (function->module->device != stand_in_device)
        return fail(INVALID_HANDLE, function->name + " was loaded on another device");
    stand_in_last_occupancy = {function->name.c_str(), threads, shared_bytes};
    *blocks = stand_in_blocks;
    return SUCCESS;
}
}
