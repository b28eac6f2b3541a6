// Kernels by instruction set and name, bindings by file: everything that registered itself before `main`.
#include <map>
#include <stdexcept>
#include <string>

#include "bindings.h"

namespace tiercel {

namespace {

using Table = std::map<std::string, Kernel>;  // by name

std::map<std::string, Table>& tables() {
    static std::map<std::string, Table> tables;
    return tables;
}
std::vector<KernelHandle*>& handles() {
    static std::vector<KernelHandle*> handles;
    return handles;
}
std::vector<void (*)(nanobind::module_&)>& bindings() {
    static std::vector<void (*)(nanobind::module_&)> bindings;
    return bindings;
}

}  // namespace

Registration::Registration(const char* isa, const char* name, Kernel kernel) { tables()[isa][name] = kernel; }
KernelHandle::KernelHandle(const char* name) : name(name) { handles().push_back(this); }
BindingRegistration::BindingRegistration(void (*bind)(nanobind::module_&)) { bindings().push_back(bind); }

void use_kernels(const std::string& isa) {
    const Table& table = tables()[isa];
    for (KernelHandle* handle : handles()) {
        const auto found = table.find(handle->name);
        if (found == table.end()) throw std::logic_error("no kernel " + std::string(handle->name) + " for " + isa);
        handle->kernel = found->second;
    }
}

std::string kernel_name(const std::string& isa, Kernel kernel) {
    for (const auto& [name, known] : tables()[isa])
        if (known == kernel) return name;
    return "?";
}

void bind_kernels(nanobind::module_& m) {
    for (const auto bind : bindings()) bind(m);
}

}  // namespace tiercel
