// The pybind11 module attn_ext._build_info: what was compiled, with what. It needs no PyTorch library, so that it can be asked
// before the ops are loaded. setup.py passes the facts.
#include <pybind11/pybind11.h>

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown compiler";
#endif

pybind11::dict facts() {
  pybind11::dict facts;
  facts["torch_version"] = ATTN_EXT_TORCH_VERSION;
  facts["compiler"] = kCompiler;
  facts["cpu_capabilities"] = ATTN_EXT_CPU_CAPABILITIES;
  facts["cuda"] = ATTN_EXT_CUDA;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "What attn_ext's extension was compiled for, and with what.";
  m.def("facts", &facts, "A dict of the build's facts.");
}
