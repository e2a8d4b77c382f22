// Do all instruction sets of this machine, with one, two and three threads, give the same bits?
//
// Random models of awkward shapes go through the C interface: group products under every mask rule, decode steps, several
// texts at once, and prefill. Prints a checksum of all results, for builds on different machines to be compared with; exits with 1 if two
// instruction sets or thread counts of this one disagree.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "lowtide.h"
#include "models.h"

namespace {

// Every bit of every result, in order.
struct Results {
  std::vector<uint32_t> words;
  bool finite = true;
  void add(const float *values, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      uint32_t word;
      std::memcpy(&word, values + i, 4);
      words.push_back(word);
      finite = finite && std::isfinite(values[i]);
    }
  }
  void add(int64_t count) { words.push_back((uint32_t)count); }
};

void group_products(lt_engine *engine, const Shape &shape, const Model &m, Results &results) {
  lt_sequence *sequence = lt_sequence_new(engine);
  for (size_t i = 0; i < (size_t)(4 * shape.layers + 1); ++i)
    for (int64_t rule : kRules) {
      const Group &g = m.groups[i];
      Random random{1000 * i + (uint64_t)rule};
      std::vector<float> x;
      for (int64_t j = 0; j < g.in; ++j) x.push_back(shape.largest ? 1.0f : random.within(2.5f));
      std::vector<std::vector<float>> y;
      for (const Linear &l : g.linear) y.emplace_back((size_t)l.out);
      std::vector<float *> to;
      for (auto &row : y) to.push_back(row.data());
      const Policy policy(rule, shape.layers);
      results.add(lt_group_product(engine, sequence, (int64_t)i, x.data(), &policy.policy, to.data()));
      for (const auto &row : y) results.add(row.data(), (int64_t)row.size());
    }
  lt_sequence_free(sequence);
}

// Decode, prefill what follows, decode on.
void text(lt_engine *engine, const Shape &shape, Results &results) {
  Random random{7};
  std::vector<float> logits((size_t)(shape.prompt * shape.vocab));
  lt_sequence *sequence = lt_sequence_new(engine);
  int64_t position = 0;
  const auto decode = [&](int64_t rule) {
    const Policy policy(rule, shape.layers);
    lt_stats stats;
    const lt_step step{sequence, random.below(shape.vocab), position++, &policy.policy, logits.data(), &stats};
    lt_decode(engine, &step, 1);
    results.add(logits.data(), shape.vocab);
    for (int64_t count : {stats.body_bits, stats.head_bits, stats.embed_bits, stats.cache_bytes}) results.add(count);
    std::vector<int64_t> bits((size_t)(4 * shape.layers + 1));
    lt_group_bits(sequence, bits.data());
    for (int64_t count : bits) results.add(count);
  };
  for (int64_t rule : kRules) decode(rule);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < shape.prompt; ++i) tokens.push_back((int32_t)random.below(shape.vocab));
  lt_prefill(engine, sequence, tokens.data(), shape.prompt, position, 1, logits.data());
  results.add(logits.data(), shape.prompt * shape.vocab);
  position += shape.prompt;
  for (int64_t rule : {LT_CHANNEL_NORM, LT_DENSE}) decode(rule);
  lt_sequence_free(sequence);
}

// Several texts of different lengths, each under a rule of its own, decoded in rounds: the bits that each gets alone.
bool rounds(lt_engine *engine, const Shape &shape) {
  constexpr int64_t kTexts = 4, kTokens = 6;
  const auto token = [&](int64_t i, int64_t position) { return (31 * i + 7 * position) % shape.vocab; };
  std::vector<std::vector<float>> alone, together;
  for (auto *logits : {&alone, &together}) {
    std::vector<lt_sequence *> sequences;
    std::vector<Policy> policies;
    for (int64_t i = 0; i < kTexts; ++i) {
      sequences.push_back(lt_sequence_new(engine));
      policies.emplace_back(kRules[(i * 3 + 6) % 7], shape.layers);
    }
    std::vector<lt_step> steps;
    for (int64_t p = 0; p < kTokens; ++p)
      for (int64_t i = 0; i < kTexts; ++i) {
        if (p + i < kTokens) {  // text i ends i tokens early
          logits->emplace_back((size_t)shape.vocab);
          steps.push_back({sequences[(size_t)i], token(i, p), p, &policies[(size_t)i].policy, logits->back().data(), nullptr});
        }
        if (logits == &alone || i == kTexts - 1) {
          lt_decode(engine, steps.data(), (int64_t)steps.size());
          steps.clear();
        }
      }
    for (lt_sequence *s : sequences) lt_sequence_free(s);
  }
  return alone == together;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names(1);
  for (const char *c = lt_available_isas(); *c; ++c) {
    if (*c == ',') {
      names.emplace_back();
    } else {
      names.back() += *c;
    }
  }
  return names;
}

// False if the results are not those of the first variant, which fills `first`.
bool same(const Shape &shape, const Model &m, const std::string &isa, int threads, Results &first) {
  char error[256] = "";
  lt_engine *engine = lt_engine_new(&m.model, threads, isa.c_str(), error, sizeof error);
  if (!engine) {
    std::printf("%s, %s, %d threads: %s\n", shape.name, isa.c_str(), threads, error);
    return false;
  }
  Results results;
  group_products(engine, shape, m, results);
  text(engine, shape, results);
  const bool apart = rounds(engine, shape);
  lt_engine_free(engine);
  if (!apart) std::printf("%s, %s, %d threads: texts decoded together differ\n", shape.name, isa.c_str(), threads);
  if (first.words.empty()) first = results;
  if (!results.finite) std::printf("%s, %s, %d threads: results are not finite\n", shape.name, isa.c_str(), threads);
  size_t different = 0, where = 0;
  for (size_t i = first.words.size(); i-- > 0;)
    if (results.words[i] != first.words[i]) ++different, where = i;
  if (different)
    std::printf("%s, %s, %d threads: %zu of %zu values differ, first number %zu\n", shape.name, isa.c_str(), threads,
                different, first.words.size(), where);
  return results.finite && apart && !different;
}

}  // namespace

int main() {
  uint64_t checksum = 0xcbf29ce484222325u;  // FNV-1a, a word at a time
  size_t values = 0;
  bool good = true;
  for (const Shape &shape : kShapes) {
    const Model m(shape);
    Results first;
    for (const std::string &isa : instruction_sets())
      for (int threads = 1; threads <= 3; ++threads) good = same(shape, m, isa, threads, first) && good;
    for (uint32_t word : first.words) checksum = (checksum ^ word) * 0x100000001b3u;
    values += first.words.size();
  }
  std::printf("instruction sets: %s\nvalues: %zu\nchecksum: %016" PRIx64 "\n", lt_available_isas(), values, checksum);
  return good ? 0 : 1;
}
