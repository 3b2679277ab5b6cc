// Drawing a token by an exponential race: of weights w, the index with the largest w / E, where each E is exponentially
// distributed, is i with probability w[i] / sum(w). Weights that differ in their last digits draw the same token, but
// where two are as near to each other as that; an inverted cumulative sum would move everything behind them.
//
// E of a token is -log(1 - v), v = (word + 1/2) / 2^32, the word from Philox4x32-10 as in random_stream.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace shoal {

constexpr int RACE_COUNTERS = 16;  // at once, side by side in vectors; each gives the words of four tokens

// Word w of counter first + i in x[w][i].
inline void philox(uint32_t index, uint32_t position, uint32_t first, uint64_t seed, uint32_t x[4][RACE_COUNTERS]) {
  for (int i = 0; i < RACE_COUNTERS; ++i) x[0][i] = position, x[1][i] = index, x[2][i] = first + i, x[3][i] = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < RACE_COUNTERS; ++i) {
      const uint64_t product_0 = (uint64_t)x[0][i] * 0xD2511F53u, product_1 = (uint64_t)x[2][i] * 0xCD9E8D57u;
      x[0][i] = (uint32_t)(product_1 >> 32) ^ x[1][i] ^ k0;
      x[1][i] = (uint32_t)product_1;
      x[2][i] = (uint32_t)(product_0 >> 32) ^ x[3][i] ^ k1;
      x[3][i] = (uint32_t)product_0;
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

// The lowest index that wins; 0 where no weight is positive.
inline int64_t race_row(const float* weights, int n, uint64_t seed, uint32_t index, uint32_t position) {
  uint32_t words[4][RACE_COUNTERS];
  double best = 0;
  int64_t winner = 0;
  for (int first = 0; first < n; first += 4 * RACE_COUNTERS) {
    philox(index, position, first / 4, seed, words);
    const int tokens = std::min(4 * RACE_COUNTERS, n - first);
    for (int i = 0; i < tokens; ++i) {
      const double v = (words[i % 4][i / 4] + 0.5) * 0x1p-32, weight = weights[first + i];
      if (!(weight > best * v)) continue;  // -log(1 - v) is more than v, so it cannot win
      const double ratio = weight / -std::log1p(-v);
      if (ratio > best) best = ratio, winner = first + i;
    }
  }
  return winner;
}

}  // namespace shoal
