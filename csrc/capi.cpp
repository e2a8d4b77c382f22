// The C interface over Engine. Nothing throws across it: what allocates is guarded, and decoding allocates nothing.
#include <cstdio>
#include <exception>
#include <new>
#include <string>

#include "engine.h"

struct lt_engine {
  lowtide::Engine engine;
};

extern "C" {

const char *lt_available_isas(void) {
  static const std::string names = [] {
    std::string joined;
    for (const lowtide::Kernels *k : lowtide::available_kernels()) joined += (joined.empty() ? "" : ",") + std::string(k->name);
    return joined;
  }();
  return names.c_str();
}

lt_engine *lt_engine_new(const lt_model *model, int threads, const char *isa, char *error, int error_size) {
  const lowtide::Kernels *kernels = lowtide::find_kernels(isa);
  if (model->abi_version != LT_ABI_VERSION) {
    std::snprintf(error, (size_t)error_size, "the native library speaks interface %d, the caller %d", LT_ABI_VERSION,
                  (int)model->abi_version);
    return nullptr;
  }
  if (!kernels) {
    std::snprintf(error, (size_t)error_size, "instruction set '%s' is not available on this machine (it has: %s)",
                  isa ? isa : "", lt_available_isas());
    return nullptr;
  }
  try {
    return new lt_engine{lowtide::Engine(*model, threads, kernels)};
  } catch (const std::exception &e) {
    std::snprintf(error, (size_t)error_size, "could not start the engine: %s", e.what());
    return nullptr;
  }
}

void lt_engine_free(lt_engine *engine) { delete engine; }

const char *lt_engine_isa(const lt_engine *engine) { return engine->engine.kernels().name; }

lt_sequence *lt_sequence_new(const lt_engine *engine) {
  try {
    return new lt_sequence{engine->engine.new_sequence()};
  } catch (const std::bad_alloc &) {
    return nullptr;
  }
}

void lt_sequence_free(lt_sequence *sequence) { delete sequence; }

void lt_decode(lt_engine *engine, const lt_step *steps, int64_t n) { engine->engine.decode(steps, n); }

int lt_prefill(lt_engine *engine, lt_sequence *sequence, const int32_t *tokens, int64_t n, int64_t position,
               int all_logits, float *logits) {
  try {
    engine->engine.prefill(sequence->sequence, tokens, n, position, all_logits != 0, logits);
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}

int64_t lt_group_product(lt_engine *engine, lt_sequence *sequence, int64_t group, const float *x,
                         const lt_policy *policy, float *const *y) {
  return engine->engine.group_product(sequence->sequence, group, x, *policy, y);
}

int64_t lt_group_bits(const lt_sequence *sequence, int64_t *out) { return sequence->sequence.group_bits(out); }

double lt_read_bandwidth(lt_engine *engine, int64_t bytes, int repeats) {
  try {
    return engine->engine.read_bandwidth(bytes, repeats);
  } catch (const std::bad_alloc &) {
    return 0;
  }
}

}  // extern "C"
