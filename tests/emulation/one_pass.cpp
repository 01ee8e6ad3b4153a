// The kernels of csrc/cuda/one_pass.cu as a library that tests/emulated.py calls.
#define EMULATION
#include "one_pass.cu"

extern "C" {

// What went wrong, or null. mutation: one that mutations() lists after a launch, or "".
const char* launch(const char* kernel, const void* arguments, unsigned grid, unsigned threads, unsigned cluster,
                   unsigned shared_bytes, int schedule, const char* mutation) {
  static std::string error;
  emulation::mutation = mutation;
  const std::string name = kernel;
  const auto run = [&](auto function, const auto* p) {
    emulation::launch([&] { function(*p); }, {grid, threads, cluster, shared_bytes, schedule, 0, nullptr});
  };
  const auto* ahead = static_cast<const ForwardArguments*>(arguments);
  const auto* back = static_cast<const BackwardArguments*>(arguments);
  try {
    if (name == "one_pass_forward_float32") run(one_pass_forward_float32, ahead);
    else if (name == "one_pass_forward_bfloat16") run(one_pass_forward_bfloat16, ahead);
    else if (name == "one_pass_backward_float32") run(one_pass_backward_float32, back);
    else if (name == "one_pass_backward_bfloat16") run(one_pass_backward_bfloat16, back);
    else throw emulation::Misuse("no kernel of this name");
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}

const char* mutations() {
  static std::string all;
  all.clear();
  for (const auto& [site, what] : emulation::possible) all += site.name(what) + "\n";
  return all.c_str();
}
}
