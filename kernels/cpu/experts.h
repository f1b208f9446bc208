// Linear layers of experts: each row goes through an expert of its own.
#pragma once

#include "linear.h"

namespace gpt_faster {

template <class Element>
struct Experts {
  Linear first;                            // expert 0; those of the others lie after each other
  int64_t weight_stride, scales_stride;    // bytes from an expert to the next
  const Element* x;                        // [T, 1 or K, in]
  const int64_t* chosen;                   // [T, K]
  Element* y;                              // [T, K, out]
  int64_t n_expert, T, K, x_rows;          // x_rows: of a token, 1 or K
  Threads threads;
  static constexpr int64_t kTokens = 1;    // of one request among the rows of an expert: how many is not known

  // The rows of one expert: gathered if there are several, so that its weight is read once.
  struct Job {
    Linear layer;
    std::vector<int64_t> places;  // in [T, K]
    const Element* x;
    Element* y;
    void* scratch;
    int64_t M() const { return places.size(); }
  };

  Linear expert(int64_t e) const {
    Linear layer = first;
    if (layer.has_codes) {
      layer.codes.codes += e * weight_stride;
      layer.codes.scales = static_cast<const char*>(first.codes.scales) + e * scales_stride;
    } else {
      layer.bf16.weight += e * weight_stride / static_cast<int64_t>(sizeof(BFloat16));
    }
    return layer;
  }

  const Element* row(int64_t place) const { return x + (x_rows == 1 ? place / K : place) * first.in; }

  // The weights of experts that no row has chosen are not read.
  std::vector<Job> jobs(Scratch& scratch) const {
    std::vector<std::vector<int64_t>> places(n_expert);
    for (int64_t i = 0; i < T * K; i++) places[chosen[i]].push_back(i);
    std::vector<Job> jobs;
    for (int64_t e = 0; e < n_expert; e++) {
      if (!places[e].empty()) jobs.push_back(job(expert(e), std::move(places[e]), scratch));
    }
    return jobs;
  }

  Job job(const Linear& layer, std::vector<int64_t> places, Scratch& scratch) const {
    const int64_t M = places.size(), in = layer.in;
    Job job{.layer = layer, .x = row(places[0]), .y = y + places[0] * layer.out};
    job.scratch = scratch.take<char>(Activations::bytes(M, in, layer.codes.multiplies_floats(dtype_of<Element>)));
    if (M > 1) {
      Element* rows = scratch.take<Element>(M * in);
      for (int64_t m = 0; m < M; m++) std::memcpy(rows + m * in, row(places[m]), in * sizeof(Element));
      job.x = rows, job.y = scratch.take<Element>(M * layer.out);
    }
    layer.quantise_rows(job.x, M, kTokens, job.scratch, threads);
    job.places = std::move(places);
    return job;
  }

  // The tiles of all experts with few rows, dealt out to the threads together: one expert has too few for each thread.
  void multiply_few_rows(const std::vector<Job>& jobs) const {
    const int64_t tiles = divide_up(first.out, kLanes), bytes_a_tile = weight_stride / tiles;
    threads.for_shares(jobs.size() * tiles, std::max<int64_t>(1, 65536 / bytes_a_tile), [&](Range share) {
      for (int64_t i = share.begin, n; i < share.end; i += n) {
        const Job& job = jobs[i / tiles];
        const int64_t begin = i % tiles;
        n = std::min(tiles - begin, share.end - i);
        const Range outputs{begin * kLanes, std::min(first.out, (begin + n) * kLanes)};
        if (job.M() <= kFewRows) job.layer.multiply_few_rows(job.x, job.y, job.M(), job.scratch, outputs);
      }
    });
  }

  void run() const {
    Scratch scratch(false);
    const std::vector<Job> all = jobs(scratch);
    for (const Job& job : all) {
      if (job.M() <= kFewRows) continue;
      job.layer.multiply_many_rows(job.x, job.y, job.M(), kTokens, job.scratch, threads);
    }
    multiply_few_rows(all);
    const int64_t out = first.out;
    for (const Job& job : all) {
      if (job.M() == 1) continue;  // its output stands in its place
      for (int64_t m = 0; m < job.M(); m++) std::memcpy(y + job.places[m] * out, job.y + m * out, out * sizeof(Element));
    }
  }
};

}  // namespace gpt_faster
