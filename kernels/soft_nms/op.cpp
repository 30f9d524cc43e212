// CPU form of soft_nms and nms; reference.py in this folder is the definition, and every operation here keeps its order
// so that both give the same bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Segment {
  double start;
  double end;
};

struct Kept {
  Segment segment;
  double threshold;
};

// `seen` counts the kept segments of the candidate's label that its score has met already.
struct Candidate {
  double score;
  int64_t index;
  size_t seen;
};

// Heap order: the highest score on top, the lowest index among equals.
bool ranks_below(const Candidate& a, const Candidate& b) {
  return a.score != b.score ? a.score < b.score : a.index > b.index;
}

double iou(const Segment& a, const Segment& b) {
  const double inter = std::max(std::min(a.end, b.end) - std::max(a.start, b.start), 0.0);
  const double together = (a.end - a.start) + (b.end - b.start) - inter;
  return together > 0 ? inter / together : 0.0;
}

struct Input {
  std::vector<Segment> segments;
  std::vector<double> scores;
  std::vector<size_t> groups;  // labels renumbered 0, 1, ... in order of appearance
  size_t num_groups = 0;
};

Input read(const Tensor& segments, const Tensor& scores, const Tensor& labels) {
  STD_TORCH_CHECK(scores.dim() == 1, "scores must have one dimension, not ", scores.dim());
  const int64_t num = scores.size(0);
  STD_TORCH_CHECK(segments.dim() == 2 && segments.size(0) == num && segments.size(1) == 2, "segments must be (", num,
                  ", 2) for ", num, " scores");
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == num, "labels must be (", num, ",) for ", num, " scores");
  STD_TORCH_CHECK(segments.is_cpu() && scores.is_cpu() && labels.is_cpu(), "all tensors must be on the CPU");

  // The typed pointers check the dtypes: float64, float64, int64.
  const double* segment_data = segments.const_data_ptr<double>();
  const double* score_data = scores.const_data_ptr<double>();
  const int64_t* label_data = labels.const_data_ptr<int64_t>();
  const int64_t row = segments.stride(0);
  const int64_t column = segments.stride(1);
  const int64_t score_step = scores.stride(0);
  const int64_t label_step = labels.stride(0);

  Input input;
  input.segments.reserve(num);
  input.scores.reserve(num);
  input.groups.reserve(num);
  std::unordered_map<int64_t, size_t> group_of_label;
  for (int64_t i = 0; i < num; ++i) {
    const Segment segment{segment_data[i * row], segment_data[i * row + column]};
    const double score = score_data[i * score_step];
    // Sorting numbers that do not compare is undefined behaviour, so this cannot be left to the caller.
    STD_TORCH_CHECK(std::isfinite(segment.start) && std::isfinite(segment.end) && std::isfinite(score), "candidate ", i,
                    " has a NaN or an infinity");
    input.segments.push_back(segment);
    input.scores.push_back(score);
    input.groups.push_back(group_of_label.try_emplace(label_data[i * label_step], group_of_label.size()).first->second);
  }
  input.num_groups = group_of_label.size();
  return input;
}

template <typename T>
Tensor to_tensor(const Tensor& like, const std::vector<T>& values, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(like, {static_cast<int64_t>(values.size())}, dtype);
  std::copy(values.begin(), values.end(), tensor.mutable_data_ptr<T>());
  return tensor;
}

// Decays only lower a score, so a candidate's outdated score bounds it from above, and the decays it has missed are
// applied when it reaches the top of the heap. A candidate that `max_keep` keeps from getting there costs nothing.
std::tuple<Tensor, Tensor> soft_nms(const Tensor& segments, const Tensor& scores, const Tensor& labels, double sigma,
                                    double threshold, double threshold_slope, std::optional<int64_t> max_keep,
                                    double min_score) {
  const Input input = read(segments, scores, labels);
  const int64_t num = static_cast<int64_t>(input.scores.size());
  const int64_t limit = std::min(max_keep.value_or(num), num);

  std::vector<Candidate> heap;
  heap.reserve(num);
  for (int64_t i = 0; i < num; ++i) {
    heap.push_back({input.scores[i], i, 0});
  }
  std::make_heap(heap.begin(), heap.end(), ranks_below);

  std::vector<std::vector<Kept>> kept_of_group(input.num_groups);
  std::vector<int64_t> order;
  std::vector<double> decayed;
  while (static_cast<int64_t>(order.size()) < limit) {
    std::pop_heap(heap.begin(), heap.end(), ranks_below);
    Candidate& candidate = heap.back();
    if (candidate.score < min_score) {
      break;
    }
    const Segment& segment = input.segments[candidate.index];
    std::vector<Kept>& kept = kept_of_group[input.groups[candidate.index]];
    const double before = candidate.score;
    for (; candidate.seen < kept.size(); ++candidate.seen) {
      const double overlap = iou(kept[candidate.seen].segment, segment);
      if (overlap > kept[candidate.seen].threshold) {
        candidate.score *= std::exp(-(overlap * overlap) / sigma);
      }
    }
    if (candidate.score < before) {
      std::push_heap(heap.begin(), heap.end(), ranks_below);
      continue;
    }
    kept.push_back({segment, threshold + threshold_slope * (segment.end - segment.start)});
    order.push_back(candidate.index);
    decayed.push_back(candidate.score);
    heap.pop_back();
  }
  return {to_tensor(scores, order, ScalarType::Long), to_tensor(scores, decayed, ScalarType::Double)};
}

Tensor nms(const Tensor& segments, const Tensor& scores, const Tensor& labels, double iou_threshold) {
  const Input input = read(segments, scores, labels);
  std::vector<int64_t> ranked(input.scores.size());
  std::iota(ranked.begin(), ranked.end(), 0);
  std::stable_sort(ranked.begin(), ranked.end(),
                   [&](int64_t a, int64_t b) { return input.scores[a] > input.scores[b]; });

  std::vector<std::vector<Segment>> kept_of_group(input.num_groups);
  std::vector<int64_t> order;
  for (const int64_t candidate : ranked) {
    const Segment& segment = input.segments[candidate];
    std::vector<Segment>& kept = kept_of_group[input.groups[candidate]];
    const bool suppressed = std::any_of(kept.begin(), kept.end(),
                                        [&](const Segment& other) { return iou(other, segment) > iou_threshold; });
    if (!suppressed) {
      kept.push_back(segment);
      order.push_back(candidate);
    }
  }
  return to_tensor(scores, order, ScalarType::Long);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lofi_fast, CPU, m) {
  m.impl("soft_nms", TORCH_BOX(&soft_nms));
  m.impl("nms", TORCH_BOX(&nms));
}
