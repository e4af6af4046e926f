// Two steps side by side: global alignment (Needleman and Wunsch, 1970) within a band around the diagonal.

#include <algorithm>
#include <limits>
#include <vector>

#include "arena.h"

namespace megamem {

namespace {

constexpr int64_t kBand = 256;  // how far the two may be apart
constexpr int32_t kEqual = 3, kOther = -1, kGap = -2;

enum Step : uint8_t { kNone, kBoth, kSkipReference, kSkipOther };

}  // namespace

void align(int32_t num_reference, const int64_t* reference, int32_t num_other, const int64_t* other, int32_t* index) {
  const int64_t rows = num_other, columns = num_reference, width = 2 * kBand + 1;
  std::fill(index, index + rows, -1);
  // Row i holds the columns from left(i) on.
  const auto left = [=](int64_t i) { return (rows == 0 ? 0 : i * columns / rows) - kBand; };
  constexpr int32_t kWorst = std::numeric_limits<int32_t>::min() / 2;
  std::vector<int32_t> above(static_cast<size_t>(width), kWorst), here(above);
  std::vector<Step> steps(static_cast<size_t>((rows + 1) * width), kNone);
  for (int64_t i = 0; i <= rows; ++i) {
    std::fill(here.begin(), here.end(), kWorst);
    for (int64_t k = 0; k < width; ++k) {
      const int64_t j = left(i) + k, shift = i == 0 ? 0 : left(i) - left(i - 1);
      if (j < 0 || j > columns) continue;
      int32_t best = i == 0 && j == 0 ? 0 : kWorst;
      Step step = kNone;
      const auto offer = [&](int32_t score, Step how) {
        if (score > best) {
          best = score;
          step = how;
        }
      };
      const auto up = [&](int64_t at) { return at >= 0 && at < width ? above[static_cast<size_t>(at)] : kWorst; };
      if (i > 0 && j > 0) offer(up(k + shift - 1) + (reference[j - 1] == other[i - 1] ? kEqual : kOther), kBoth);
      if (j > 0 && k > 0) offer(here[static_cast<size_t>(k - 1)] + kGap, kSkipReference);
      if (i > 0) offer(up(k + shift) + kGap, kSkipOther);
      here[static_cast<size_t>(k)] = best;
      steps[static_cast<size_t>(i * width + k)] = step;
    }
    std::swap(above, here);
  }
  for (int64_t i = rows, j = columns; i > 0 || j > 0;) {
    const int64_t k = j - left(i);
    const Step step = k >= 0 && k < width ? steps[static_cast<size_t>(i * width + k)] : kNone;
    if (step == kNone) break;
    if (step == kBoth) index[i - 1] = static_cast<int32_t>(j - 1);
    i -= step != kSkipReference;
    j -= step != kSkipOther;
  }
}

}  // namespace megamem
