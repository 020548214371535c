#include "pipelines/train/run.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <ratio>
#include <set>
#include <system_error>
#include <vector>

#include "common/core/cancel.h"
#include "common/core/deadline.h"
#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/process.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/tensor/memory.h"
#include "common/tensor/memory_errors.h"
#include "formats/cache/files.h"
#include "formats/cache/lock.h"
#include "formats/checkpoint/checkpoint.h"
#include "pipelines/train/load.h"
#include "pipelines/train/lora_options.h"
#include "pipelines/train/metrics.h"
#include "pipelines/train/ranks.h"
#include "pipelines/train/report.h"
#include "pipelines/train/samples.h"
#include "pipelines/train/save.h"
#include "pipelines/train/step.h"
#include "pipelines/train/tensorboard.h"
#include "pipelines/train/time_limit.h"
#include "pipelines/train/validate.h"

namespace flux::train {
namespace {

void check_out(const Options& options) {
  const auto steps = checkpoint::steps_in(options.out);
  if (steps.empty() || options.resume || options.replace) return;
  throw UsageError(
      fmt::format("--out: {} holds checkpoints up to step {}", show(options.out), steps.back()),
      "--resume goes on from there, --replace moves them aside and starts anew");
}

/// Of the run's folder, which may be made later.
using RunLock = std::optional<cache::WriterLock>;

// Nothing of the folder is read while another run writes there.
void lock_out(const Options& options, RunLock& lock) {
  std::error_code error;
  // a finished run is looked at without a lock where nothing can be written
  if (std::filesystem::is_directory(options.out, error))
    lock.emplace(options.out, cache::WriterLock::Needed::kToWrite);
}

// After all inputs were found good, so that a run that cannot start moves nothing.
void prepare_out(const Options& options, RunLock& lock) {
  make_folder(options.out);
  if (!lock) {
    lock.emplace(options.out);
    check_out(options);  // another run may have been there meanwhile
  }
  lock->require_held();
  if (options.resume) {
    checkpoint::remove_leftovers(options.out);
  } else if (const auto moved = checkpoint::start_run(options.out)) {
    std::error_code ignored;
    std::filesystem::remove(*moved / cache::kWriterLockName, ignored);  // it went along
    lock.emplace(options.out);
    log::info("moved the run that was there to {}", show(*moved));
  }
  write_file_atomic(options.out / "run.toml", run_toml(options));
}

/// When --save-every or --validate-every is due.
class Clock {
 public:
  Clock(const SaveEvery& every, int64_t epoch) : every_(every), epoch_(epoch) {}
  /// After a step; `epoch`: whole ones so far.
  bool due(int64_t step, int64_t epoch) {
    const bool epoch_ends = every_.epochs > 0 && epoch / every_.epochs > epoch_ / every_.epochs;
    epoch_ = epoch;
    const std::chrono::duration<double, std::ratio<60>> minutes = Steady::now() - done_;
    return epoch_ends || (every_.steps > 0 && step % every_.steps == 0) ||
           (every_.minutes > 0 && minutes.count() >= every_.minutes);
  }
  void done() { done_ = Steady::now(); }

 private:
  using Steady = std::chrono::steady_clock;
  SaveEvery every_;
  int64_t epoch_;
  Steady::time_point done_ = Steady::now();
};

void compare_with_plan(const Session& session, const StepMetrics& step) {
  log::info("memory: tensors {} at most, {} planned; process {}",
            show_bytes(static_cast<uint64_t>(step.memory_peak_bytes)),
            show_bytes(static_cast<uint64_t>(planned_peak_bytes(session))),
            show_bytes(peak_rss_bytes()));
}

/// Of the progress line.
std::string describe(const StepMetrics& step, const Session& session) {
  const std::string text = fmt::format(
      "loss {:.4f} (smoothed {:.4f}), lr {:.3g}{}, {:.3g} images/s, {:.0f} % waiting for data, "
      "memory "
      "{} of {} planned",
      step.loss,
      step.loss_smoothed,
      step.learning_rate,
      step.grad_norm ? fmt::format(", gradient norm {:.3g}", *step.grad_norm) : "",
      step.images_per_second(),
      100 * step.data_wait_share(),
      show_bytes(static_cast<uint64_t>(step.memory_peak_bytes)),
      show_bytes(static_cast<uint64_t>(planned_peak_bytes(session))));
  if (!session.validation) return text;
  return fmt::format(
      "{}, validation {:.4f} at step {}", text, session.validation->loss, session.validation->step);
}

/// After a step whose checkpoint is on the disk: marks it if it is the best one.
void mark_if_best(Session& session) {
  const auto& now = session.validation;
  if (!now || now->step != session.step) return;
  // other noise levels or samples begin another series
  if (session.best && now->comparable(*session.best) && now->loss >= session.best->loss) return;
  session.best = now;
  mark_best(session.options.out, session.best);
  log::info("step {} has the lowest validation loss so far, {:.6g}", now->step, now->loss);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Whether the last step can be saved after a failure: it must be whole, and where ranks share the weights all must have
/// failed together, for the parts of one that failed alone are lost.
bool can_save(const Session& session, const std::exception_ptr& failure) {
  const bool whole = session.trainer->step_is_whole();
  if (!shares_weights(session)) return whole;
  try {
    std::rethrow_exception(failure);
  } catch (const CommonFailure&) {
    return std::ranges::all_of(gather_numbers(session, {whole}),
                               [](const auto& its) { return its[0] != 0; });
  } catch (...) {
    log::info("nothing is saved: the part that the rank which failed has of the weights is lost");
    return false;
  }
}

void train_steps(Session& session, BatchReader& reader, Report& report) {
  const Options& options = session.options;
  std::optional<Metrics> metrics;
  std::optional<EventFile> events;
  std::optional<Progress> progress;
  if (session.leads()) {
    metrics.emplace(options.out / "metrics.jsonl", session.step);
    if (!options.no_tensorboard) events.emplace(options.out / "tensorboard", session.step + 1);
    progress.emplace("training", "steps", options.max_steps - session.step);
  }
  const int64_t first = session.step;
  int64_t saved = first;
  Clock save_clock(options.save_every, session.position.epoch);
  Clock validate_clock(options.validate_every, session.position.epoch);
  // weights may be read from the one that was resumed all the time
  const std::set<int64_t> needed{first};
  TimeLimit limit(session.leads() ? options.time_limit : 0, checkpoint_bytes(session));
  bool out_of_time = false;
  // from when on validation and pictures are left for the save
  const auto set_deadline = [&] {
    if (session.leads() && options.time_limit > 0 && !out_of_time)
      cancel::set_deadline(limit.deadline());
  };
  set_deadline();
  const auto save_now = [&] {
    if (saved == session.step) return;
    const auto finishing = session.group ? session.group->finishing() : nullptr;
    if (metrics) metrics->flush();
    const double start = process_seconds();
    save(session);
    saved = session.step;
    save_clock.done();
    if (!session.leads()) return;
    limit.save_took(process_seconds() - start);
    set_deadline();
    mark_if_best(session);
    if (options.keep_last > 0) {
      std::set<int64_t> spared = needed;
      if (session.best) spared.insert(session.best->step);
      checkpoint::remove_older(options.out, saved, options.keep_last, spared);
    }
    write_report(session);
  };
  // Whatever it was, the last whole step stays: a damaged segment can be made again, a batch
  // made smaller. Of a full fine-tuning that updates in the backward it may not be whole any more.
  const auto save_and_rethrow = [&](const std::exception_ptr& failure) {
    try {
      if (can_save(session, failure)) save_now();
    } catch (const std::exception& error) {
      log::error("the last step could not be saved either: {}", error.what());
    }
    std::rethrow_exception(failure);
  };
  const auto sample = [&] {
    try {
      return sample_if_due(session);
    } catch (...) {
      save_and_rethrow(std::current_exception());
      return false;  // never
    }
  };
  if (first > 0) sample();  // what an interruption left out
  double waited = 0;
  // before a step that would not fit, rank 0 says so to all
  const auto agreed = [&](bool saves, bool validates) {
    if (!out_of_time && session.step < options.max_steps && limit.ends(process_seconds())) {
      out_of_time = true;
      log::info("{}", limit.describe(process_seconds()));
      cancel::set_deadline(0);
    }
    return agree(session, {cancel::requested(), saves, validates});
  };
  auto next = agreed(false, false);
  if (out_of_time)
    log::warn("--time-limit leaves no time for a step: with no more than that nothing gets done");
  while (session.step < options.max_steps && !next.stop) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<Batch> batches;
    int64_t last_epoch = 0;  // of the step's last batch, whichever rank's it is
    StepResult result;
    try {
      const auto outline = reader.outline(options.batches_a_step());
      last_epoch = outline.back().epoch;
      for (int64_t i = 0; i < options.gradient_accumulation; ++i) batches.push_back(reader.next());
      result = train_step(session, batches, outline);
      session.position = reader.position();
      limit.step_took(seconds_since(start));
      const int64_t epoch = session.position.epoch;
      const bool saves = save_clock.due(session.step, epoch) || session.step == options.max_steps;
      next = agreed(saves, validate_clock.due(session.step, epoch) || saves);
    } catch (...) {
      save_and_rethrow(std::current_exception());
    }
    const double seconds = seconds_since(start);
    report.loss_last = result.loss;
    if (!report.loss_first) {
      report.loss_first = result.loss;
      report.seconds_to_first_step = process_seconds();
      log::info("step {}: loss {:.4f}, {:.2f} s after the start",
                session.step,
                result.loss,
                *report.seconds_to_first_step);
    }
    StepMetrics line{.step = session.step,
                     .epoch = last_epoch + 1,
                     .loss = result.loss,
                     .learning_rate = result.learning_rate,
                     .learning_rates = group_learning_rates(options, result.learning_rate),
                     .grad_norm = result.grad_norm,
                     .samples = static_cast<int64_t>(result.sigma.size()),
                     .seconds = seconds,
                     .data_wait_seconds = reader.wait_seconds() - waited,
                     .memory_peak_bytes = device_peak_bytes(session.device),
                     .sigma = result.sigma,
                     .sample_loss = result.sample_loss};
    waited = reader.wait_seconds();
    batches.clear();
    if (session.step == first + 1) compare_with_plan(session, line);
    std::exception_ptr failure;
    if (next.validates && session.validation_batches > 0) {
      try {
        if (auto found = validate(session)) {
          session.validation = line.validation = std::move(found);
          report.validation_loss = session.validation->loss;
        }
      } catch (...) {
        failure = std::current_exception();
      }
      validate_clock.done();
    }
    if (metrics) metrics->write(line);
    if (events) events->add(line.step, line.curves());
    if (progress) progress->update(session.step - first, describe(line, session));
    if (failure) save_and_rethrow(failure);
    if (next.saves) save_now();
    // all of that may take long: another step after a signal meanwhile would be one too many
    if (sample() || next.saves || next.validates) next.stop = agreed_stop(session);
  }
  save_now();
  if (next.stop)
    report.exit_code = *next.stop;
  else
    cancel::set_deadline(std::nullopt);  // all is done
}

Report report_of(const Session& session, Report report) {
  if (const auto signal = cancel::requested()) report.exit_code = *signal;
  report.steps = session.step;
  report.seconds = process_seconds();
  report.peak_rss_bytes = peak_rss_bytes();
  if (session.best) {
    report.best_step = session.best->step;
    report.best_loss = session.best->loss;
  }
  return report;
}

/// The checkpoint to go on from, if rank 0 is to resume. It reads all of it, to see that it is good, the others what it says.
std::optional<checkpoint::Checkpoint> latest(const Session& session) {
  const auto& out = session.options.out;
  std::optional<checkpoint::Checkpoint> found;
  together(session, [&] {
    if (session.leads() && session.options.resume) found = checkpoint::read_latest(out);
  });
  const int64_t step = gather_numbers(session, {found ? found->step : -1})[0][0];
  together(session, [&] {
    if (!session.leads() && step >= 0) found = checkpoint::read_unchecked(out, step);
  });
  return found;
}

Report run_rank(const Options& asked, dist::Group* group, Session& session) {
  RunLock lock;
  if (asked.launch.rank == 0) {
    lock_out(asked, lock);
    check_out(asked);
  }
  session = open_data(asked);
  session.group = group;
  const Options& options = session.options;
  std::optional<checkpoint::Checkpoint> resumed;
  if (options.resume || group) resumed = latest(session);
  if (options.resume && !resumed)
    log::info("{}: no checkpoint is there: a new run", show(options.out));
  if (resumed) {
    session.position = position_of(*resumed);
    session.step = resumed->step;
    if (session.step > options.max_steps) {
      throw UsageError(fmt::format("--{} {}, but {} is beyond",
                                   options.max_epochs > 0 ? "max-epochs" : "max-steps",
                                   options.max_epochs > 0 ? options.max_epochs : options.max_steps,
                                   show(resumed->folder)),
                       "give the number of steps in all, those done included");
    }
    require_same_run(session, *resumed);
  }
  const bool resumes_weights = resumed && options.method == Method::kFull;
  open_model(session, resumes_weights ? weights_in(resumed->folder) : options.model);
  require_same_ranks(session);
  if (resumed && session.step == options.max_steps) {
    if (session.leads()) start_hashing(session);
    require_same_model(session, *resumed);
    log::info("{}: all {} steps are done", show(resumed->folder), session.step);
    return report_of(session, {});
  }
  // the first batches are read while the model is
  BatchReader reader(
      *session.data,
      session.position,
      {.num_threads = options.reader_threads,
       .num_ahead = options.prefetch,
       .num_batches = (options.max_steps - session.step) * options.gradient_accumulation,
       .turn = options.launch.rank,
       .stride = options.launch.world});
  load_model(session);
  if (session.leads()) start_hashing(session);
  if (options.method == Method::kLora && !options.no_tags) start_reading_captions(session);
  if (resumed) {
    restore(session, *resumed);
    log::info("resumed {} at epoch {} batch {}",
              show(resumed->folder),
              session.position.epoch + 1,
              session.position.batch + 1);
  }
  if (session.leads()) {
    prepare_out(options, lock);
    if (resumed) session.best = best_checkpoint(options.out, session.step);
    mark_best(options.out, session.best);
  }
  if (shares_weights(session)) require_common_out(session);

  Report report;
  train_steps(session, reader, report);
  return report_of(session, report);
}

Report run_in_memory(const Options& options) {
  const auto group = join_ranks(options);
  // outlives the report of a failure: its threads wait for the other ranks, until those know
  Session session;
  if (!group) return run_rank(options, nullptr, session);
  try {
    const Report report = run_rank(options, group.get(), session);
    group->leave();
    return report;
  } catch (const std::exception& error) {
    group->fail(split(error.what(), '\n')[0]);
    throw;
  }
}

}  // namespace

std::string Report::line() const {
  const auto shown = [](const std::optional<double>& loss) {
    return loss ? fmt::format("{:.4f}", *loss) : std::string("none");
  };
  const std::string best =
      best_step ? fmt::format(" best_step={} best_loss={:.4f}", *best_step, *best_loss) : "";
  return fmt::format(
      "steps={} loss_first={} loss_last={}{}{} seconds={:.1f} peak_rss={}",
      steps,
      shown(loss_first),
      shown(loss_last),
      validation_loss ? fmt::format(" validation_loss={:.4f}", *validation_loss) : "",
      best,
      seconds,
      show_bytes(peak_rss_bytes));
}

nlohmann::json Report::object() const {
  const auto value = [](const std::optional<double>& number) {
    return number ? nlohmann::json(*number) : nlohmann::json();
  };
  return {{"steps", steps},
          {"loss_first", value(loss_first)},
          {"loss_last", value(loss_last)},
          {"seconds", seconds},
          {"seconds_to_first_step", value(seconds_to_first_step)},
          {"validation_loss", value(validation_loss)},
          {"best_step", best_step ? nlohmann::json(*best_step) : nlohmann::json()},
          {"best_loss", value(best_loss)},
          {"peak_rss_bytes", peak_rss_bytes}};
}

Report run(const Options& options) {
  count_tensor_memory();
  // until there is something to save
  cancel::set_deadline(options.time_limit > 0 ? std::optional(options.time_limit) : std::nullopt);
  return with_memory_errors("out of memory",
                            "give a smaller --host-memory or --device-memory, so that less stays "
                            "there, or a smaller --batch-size or resolution",
                            [&] { return run_in_memory(options); });
}

}  // namespace flux::train
