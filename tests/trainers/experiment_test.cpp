// Whole experiments: their results and files, and that killed or signalled ones go on to the very same.
#include "tests/trainers/experiment_fixture.h"

namespace baton::test {
namespace {

// ---------------------------------------------------------------------------------------------------- parts of a task

TEST_F(Experiment, ASignalledExperimentGoesOn) {
  BATON_NEEDS_DEVICE();
  expect_signals_leave_no_trace(experiment_digits(72, 30), part_runs(), SIGTERM, 3, 9, 5);
  ASSERT_EQ(result("whole")["runs"].size(), 4u);
  ASSERT_EQ(lines("whole").size(), 2u * 2 * 2 * 3);  // a line for each of three epochs, the last of half
}

// A stage's time is that of all its steps, an epoch's too, whatever came between.
TEST_F(Experiment, TimeGoesOn) {
  BATON_NEEDS_DEVICE();
  const ExperimentData data = experiment_digits(72, 30);
  {
    AtQuestion at;
    at.signal(SIGTERM, 5);  // before step 7, in the second epoch of four steps
    EXPECT_THROW(run_experiment(options("a"), data, part_runs()), Stopped);
  }
  TensorFile file = load_safetensors(checkpoint("a"));
  EXPECT_EQ(file.metadata.at("stage_step"), "6,6");
  json extra = json::parse(file.metadata.at("extra"));
  const double in_stage = extra["learners"][0][2], in_epoch = extra["learners"][0][3];
  EXPECT_GT(in_epoch, 0);
  EXPECT_GT(in_stage, in_epoch);
  extra["learners"][0][2] = 2000;
  extra["learners"][0][3] = 1000;
  file.metadata["extra"] = extra.dump();
  save_safetensors(checkpoint("a"), file);
  const json stage = run_experiment(options("a", true), data, part_runs())["runs"][0]["stages"][0];
  EXPECT_TRUE(double(stage["seconds"]) > 2000 && double(stage["seconds"]) < 2500) << stage["seconds"];
  const json log = lines("a");
  EXPECT_TRUE(double(log[2]["seconds"]) > 1000 && double(log[2]["seconds"]) < 1500) << log[2]["seconds"];
  EXPECT_LT(double(log[4]["seconds"]), 500);
}

// Whole tables in one pass: stages end at different steps, and one number of parts takes more steps than another. Each
// run has the figures that it has alone, on however many others it waits.
TEST_F(Experiment, ATableInOnePass) {
  BATON_NEEDS_DEVICE();
  const ExperimentData data = experiment_digits(72, 30);
  const std::vector<ExperimentRun> runs = part_runs({1, 10}, {"ft", "ffg", "mnf"});
  const auto by_run = [](const json& lines) {
    std::map<int, json> log;
    for (const json& line : lines) log[line["run"]].push_back(line);
    return log;
  };
  at_once_ = 1;
  const json alone = timeless(run_experiment(options("alone"), data, runs));
  ASSERT_EQ(alone["runs"].size(), 12u);
  ASSERT_EQ(alone["runs"][2]["stages"].size(), 10u);
  for (int at_once : {0, 3, 4}) {
    at_once_ = at_once;
    const std::string name = "together" + std::to_string(at_once);
    EXPECT_EQ(timeless(run_experiment(options(name), data, runs)), alone);
    EXPECT_EQ(by_run(timeless(lines(name))), by_run(timeless(lines("alone"))));
  }
}

// A pass is stopped where some of its runs have ended, and others are in the middle of an epoch.
TEST_F(Experiment, ASignalledTableGoesOn) {
  BATON_NEEDS_DEVICE();
  at_once_ = 4;
  expect_signals_leave_no_trace(experiment_digits(72, 30), part_runs({1, 5}, {"mnf", "ft"}), SIGTERM, 11, 15, 11);
  ASSERT_EQ(result("whole")["runs"].size(), 8u);
}

TEST_F(Experiment, ResultsOfParts) {
  BATON_NEEDS_DEVICE();
  const json r = run_experiment(options("a"), experiment_digits(72, 30), part_runs());
  ASSERT_EQ(r["runs"].size(), 4u);
  for (size_t i = 0; i < 4; i++) {
    const json& one = r["runs"][i];
    const bool point = i < 2;
    EXPECT_EQ(one["method"], point ? "ft" : "ffg");
    EXPECT_EQ(one["seed"], i % 2 ? 5 : 0);
    EXPECT_EQ(one["parts"], 2);
    EXPECT_FALSE(one.contains("inference"));
    EXPECT_EQ(one["settings"], describe_settings(part_runs()[i]));
    ASSERT_EQ(one["stages"].size(), 2u);
    for (const json& stage : one["stages"]) {
      EXPECT_EQ(stage["train_examples"], 36);
      EXPECT_EQ(stage["samples"], point ? 0 : 3);
      EXPECT_TRUE(double(stage["test_accuracy"]) >= 0 && double(stage["test_accuracy"]) <= 1);
      for (const char* key : {"by_task", "by_inference", "sigma_largest"}) EXPECT_FALSE(stage.contains(key)) << key;
      for (const char* key : {"kl", "kl_by_layer", "mean_log_std"}) EXPECT_EQ(stage.contains(key), !point) << key;
      if (point) continue;
      EXPECT_GT(double(stage["kl"]), 0);
      EXPECT_NEAR(double(stage["kl_by_layer"]["fc1"]) + double(stage["kl_by_layer"]["fc2"]), stage["kl"], 1e-9);
    }
  }
  EXPECT_NE(r["runs"][0]["split_hash"], r["runs"][1]["split_hash"]);  // of another seed
  EXPECT_EQ(r["runs"][0]["split_hash"], r["runs"][2]["split_hash"]);
  const std::string table = format_table(r);
  for (const char* label : {"ft ", "ffg "}) EXPECT_NE(table.find(label), std::string::npos) << table;
}

// -------------------------------------------------------------------------------------------------- tasks, one by one
TEST_F(TaskExperiment, ResultAndFiles) {
  BATON_NEEDS_DEVICE();
  std::vector<ExperimentRun> runs{bgd_run(0),
                                  bgd_run(1),
                                  task_run("sgd", 0, {{"lr", 0.05}}),
                                  task_run("ewc", 0, ewc_settings),
                                  task_run("si", 0, {{"lr", 1e-3}, {"strength", 0.5}}),
                                  task_run("bbb", 0, {{"lr", 1e-3}, {"draws", 2}, {"sigma", 0.03}})};
  runs[0].histogram = true;
  runs[1].inference = Inference::committee;
  const json r = run_experiment(options("a"), experiment_digits(), runs);
  EXPECT_EQ(r, result("a"));
  EXPECT_FALSE(fs::exists(folder_ / "a" / "checkpoint"));
  EXPECT_EQ(r["experiment"], "test");
  EXPECT_EQ(r["preset"], "tiny");
  EXPECT_EQ(r["dataset"]["train"], train_images);
  EXPECT_EQ(r["dataset"]["test"], test_images);
  EXPECT_EQ(r["dataset"]["generated"], true);
  EXPECT_EQ(r["settings"]["note"], 7);
  EXPECT_EQ(r["precision"], "fp32");
  EXPECT_GT(size_t(r["peak_device_bytes"]), 0u);
  ASSERT_EQ(r["runs"].size(), runs.size());
  const size_t parameters = 784 * 8 + 8 + 8 * 10 + 10;
  for (size_t i = 0; i < runs.size(); i++) {
    const json& one = r["runs"][i];
    SCOPED_TRACE(one["label"].get<std::string>());
    EXPECT_EQ(one["method"], runs[i].method);
    EXPECT_EQ(one["label"], runs[i].label);
    EXPECT_EQ(one["seed"], runs[i].training.replicas[0].seed);
    EXPECT_EQ(one["settings"], describe_settings(runs[i]));
    for (const auto& [name, value] : runs[i].training.replicas[0].settings.items())
      EXPECT_EQ(one["settings"][name], value) << name;
    EXPECT_EQ(one["parts"], 3);
    EXPECT_EQ(one["parameters"], parameters);
    EXPECT_EQ(one["inference"], name(*runs[i].inference));
    ASSERT_EQ(one["stages"].size(), 3u);
    for (int s = 0; s < 3; s++) {
      const json& stage = one["stages"][s];
      EXPECT_EQ(stage["stage"], s + 1);
      EXPECT_EQ(stage["epoch"], 2);
      EXPECT_EQ(stage["train_examples"], train_images);
      ASSERT_EQ(stage["by_task"].size(), size_t(s + 1));
      double mean = 0;
      for (const json& accuracy : stage["by_task"]) {
        EXPECT_TRUE(double(accuracy) >= 0 && double(accuracy) <= 1);
        mean += double(accuracy) / (s + 1);
      }
      EXPECT_NEAR(stage["test_accuracy"], mean, 1e-12);
      EXPECT_NEAR(stage["by_inference"][name(*runs[i].inference)], mean, 1e-12);
      // Before the last stage only the ways that the run's own inference takes.
      if (s == 2) {
        EXPECT_EQ(stage["by_inference"].size(), 4u);
      }
      EXPECT_TRUE(double(stage["test_nll"]) > 0 && double(stage["test_nll"]) < 30);
      EXPECT_TRUE(double(stage["test_ece"]) >= 0 && double(stage["test_ece"]) <= 1);
      EXPECT_GT(double(stage["seconds"]), 0);
      EXPECT_EQ(stage.contains("sigma_largest"), runs[i].method == "bgd");
    }
    EXPECT_EQ(one["final_test_accuracy"], one["stages"][2]["test_accuracy"]);
    EXPECT_EQ(one.contains("sigma"), runs[i].method == "bgd");
    EXPECT_FALSE(one.contains("pruning"));
    EXPECT_FALSE(one.contains("warnings"));
    if (runs[i].method != "bgd" && runs[i].method != "bbb") {  // one network: it is all one
      for (const json& accuracy : one["stages"][2]["by_inference"]) EXPECT_EQ(accuracy, one["final_test_accuracy"]);
    }
  }
  const json& sigma = r["runs"][0]["sigma"];
  EXPECT_EQ(sigma["initial"], 0.04);
  EXPECT_LE(double(sigma["smallest"]), double(sigma["median"]) * 1.1);
  EXPECT_LE(double(sigma["median"]), double(sigma["largest"]) * 1.1);
  ASSERT_EQ(sigma["edges"].size(), sigma["counts"].size() + 1);
  size_t count = 0;
  for (const json& c : sigma["counts"]) count += size_t(c);
  EXPECT_EQ(count, parameters);
  EXPECT_GT(size_t(sigma["counts"].front()), 0u);
  EXPECT_GT(size_t(sigma["counts"].back()), 0u);
  EXPECT_LE(double(sigma["edges"].front()), double(sigma["smallest"]));
  EXPECT_GT(double(sigma["edges"].back()), double(sigma["largest"]));
  EXPECT_FALSE(r["runs"][1]["sigma"].contains("counts"));

  const json log = lines("a");
  ASSERT_EQ(log.size(), runs.size() * 3 * 2);  // a line an epoch
  for (size_t i = 0; i < log.size(); i++) {
    EXPECT_EQ(log[i]["run"], i / 6);
    EXPECT_EQ(log[i]["label"], runs[i / 6].label);
    EXPECT_EQ(log[i]["stage"], i % 6 / 2 + 1);
    EXPECT_EQ(log[i]["epoch"], i % 2 + 1);
    EXPECT_EQ(log[i]["step"], (i % 6 + 1) * 6);
    EXPECT_TRUE(double(log[i]["train_loss"]) > 0);
  }
  const std::string table = format_table(r);
  for (const char* label : {"bgd 8", "sgd 8", "ewc 8", "si 8", "bbb 8"})
    EXPECT_NE(table.find(label), std::string::npos) << table;
}

// The figures of a stage by every way of inference are what their names say, whichever way the run asks for.
TEST_F(TaskExperiment, EveryStageByEveryInference) {
  BATON_NEEDS_DEVICE();
  std::vector<json> by;
  for (Inference inference : all_inferences) {
    std::vector<ExperimentRun> runs{bgd_run()};
    runs[0].inference = inference;
    by.push_back(run_experiment(options(name(inference)), experiment_digits(), runs)["runs"][0]["stages"]);
  }
  for (int stage = 0; stage < 3; stage++)
    for (const json& stages : by)
      for (size_t i = 0; i < by.size(); i++) {
        const char* way = name(Inference(i));
        if (!stages[stage]["by_inference"].contains(way)) continue;  // it need not be there
        EXPECT_EQ(stages[stage]["by_inference"][way], by[i][stage]["test_accuracy"])
            << "stage " << stage + 1 << ", " << way;
      }
}

TEST_F(TaskExperiment, JudgementsWithinAStage) {
  BATON_NEEDS_DEVICE();
  std::vector<ExperimentRun> runs{bgd_run(0), bgd_run(1)};
  runs[0].stages = permuted(1);
  runs[0].training.epochs = 4;
  runs[0].measure_every = 1;
  runs[1].stages = whole_set(train_images);
  runs[1].stages.pixel_order = permute_pixels(3, 784, 5);
  runs[1].stages.probabilities = continuous_schedule(3, 12, 4);
  runs[1].checks = 4;
  const json r = run_experiment(options("a"), experiment_digits(), runs);
  ASSERT_EQ(r["runs"][0]["stages"].size(), 4u);
  for (int i = 0; i < 4; i++) {
    EXPECT_EQ(r["runs"][0]["stages"][i]["epoch"], i + 1);
    EXPECT_EQ(r["runs"][0]["stages"][i]["by_task"].size(), 1u);
  }
  EXPECT_EQ(r["runs"][1]["parts"], 3);
  ASSERT_EQ(r["runs"][1]["stages"].size(), 4u);
  for (int i = 0; i < 4; i++) {
    EXPECT_EQ(r["runs"][1]["stages"][i]["epoch"], (i + 1) * 0.5);  // 3 of 6 steps
    EXPECT_EQ(r["runs"][1]["stages"][i]["by_task"].size(), 3u);
  }
}

TEST_F(TaskExperiment, Pruning) {
  BATON_NEEDS_DEVICE();
  std::vector<ExperimentRun> runs{bgd_run(), task_run("sgd", 0, {{"lr", 0.05}})};
  for (ExperimentRun& r : runs) {
    r.stages = permuted(1);
    r.pruned = {0, 0.9, 0.333, 0, 1};
  }
  ExperimentOptions o = options("a");
  o.save_models = true;
  const ExperimentData data = experiment_digits();
  const json result = run_experiment(o, data, runs);
  const int weights = 784 * 8 + 8 * 10;
  for (const json& run : result["runs"]) {
    SCOPED_TRACE(run["label"].get<std::string>());
    const json& pruning = run["pruning"];
    const bool uncertain = run["method"] == "bgd";
    EXPECT_EQ(pruning["weights"], weights);
    EXPECT_NEAR(pruning["error"], 1 - double(run["final_test_accuracy"]), 1e-12);
    ASSERT_EQ(pruning["results"].size(), uncertain ? 10u : 5u);
    for (size_t i = 0; i < pruning["results"].size(); i++) {
      const json& one = pruning["results"][i];
      const double fraction = runs[0].pruned[i % 5];
      SCOPED_TRACE(testing::Message() << one["ranking"] << " " << fraction);
      EXPECT_EQ(one["ranking"], uncertain && i < 5 ? "signal-to-noise" : "magnitude");
      EXPECT_EQ(one["fraction"], fraction);
      const int left = weights - int(std::lround(fraction * weights));
      EXPECT_EQ(one["weights_left"], left);
      EXPECT_EQ(one["bytes_dense"], (uncertain ? 8 : 4) * weights);
      EXPECT_EQ(one["bytes_sparse"], (uncertain ? 12 : 8) * left);
      // What is left of each layer is what is left in all; after fraction 1 or .9 fraction 0 finds the network whole.
      EXPECT_NEAR(double(one["layers"]["fc1.weight"]) * 784 * 8 + double(one["layers"]["fc2.weight"]) * 80, left, 1e-6);
      if (fraction == 0) {
        EXPECT_EQ(one["error"], pruning["error"]);
        EXPECT_NEAR(one["error_ratio"], 1, 1e-12);
      }
      if (fraction == 1) {
        EXPECT_GT(double(one["error"]), 0.6);  // biases alone
      }
    }
    // The pruned model is the whole one where it is not masked, and makes the errors that were measured.
    const std::string file = run["method"].get<std::string>() + "_8_seed0";
    const Model whole = read_model(o.out / (file + ".safetensors"));
    EXPECT_FALSE(whole.masked);
    EXPECT_EQ(whole.arrays.has("fc1.weight.log_std"), uncertain);
    Device device;
    Arena arena;
    const auto [pruned, posterior] = load_model(device, arena, o.out / (file + "_pruned90.safetensors"));
    EXPECT_TRUE(pruned.masked);
    EXPECT_EQ(pruned.pruned["fraction"], 0.9);
    int left = 0;
    for (const TensorSpec& t : posterior->store().layout().tensors()) {
      const std::vector<float> all = whole.arrays.at(t.name + ".mean", t.shape).as<float>(),
                               kept = pruned.arrays.at(t.name + ".mean", t.shape).as<float>();
      const std::vector<uint8_t> mask = pruned.arrays.at(t.name + ".mask", t.shape).as<uint8_t>();
      for (size_t i = 0; i < all.size(); i++) EXPECT_EQ(kept[i], mask[i] ? all[i] : 0) << t.name << " " << i;
      const int unmasked = int(std::count(mask.begin(), mask.end(), 1));
      EXPECT_TRUE(!t.bias || unmasked == int(t.size)) << t.name;
      if (!t.bias) left += unmasked;
      if (!uncertain) continue;
      const std::vector<float> log_std = whole.arrays.at(t.name + ".log_std").as<float>(),
                               kept_log_std = pruned.arrays.at(t.name + ".log_std").as<float>();
      for (size_t i = 0; i < all.size(); i++)
        EXPECT_TRUE(!mask[i] || kept_log_std[i] == log_std[i]) << t.name << " " << i;
    }
    EXPECT_EQ(left, weights - int(std::lround(0.9 * weights)));
    Predictor predictor(device, arena, network_factory(pruned.network),
                        upload_images(device, arena, data.test[0], unit_range));
    const Predictions p = predictor.predict(*posterior, 0, 5, 12, /*choices*/ true);  // seed 0, step 12
    const double accuracy = uncertain ? sampled_accuracy(p.chosen, data.test[0].labels)
                                      : evaluate(p.probability, data.test[0].labels, 10, {}, {}).accuracy;
    EXPECT_NEAR(1 - accuracy, pruning["results"][1]["error"], 1e-12);
  }
}

// ------------------------------------------------------------------------------------------------------- saved models
// A saved model predicts what was measured; a model of kind ffg learns on by either rule. heads: two, one a task.
void expect_model_goes_on(ExperimentRun run, ExperimentOptions options, const ExperimentData& data, bool heads) {
  SCOPED_TRACE(run.method);
  run.training.epochs = 1;
  options.save_models = true;
  const json last = run_experiment(options, data, {run})["runs"][0]["stages"][1];
  Device device;
  Arena arena;
  const uint64_t seed = run.training.replicas[0].seed;
  const std::string file = run.method + "_8_seed" + std::to_string(seed) + ".safetensors";
  const auto [model, posterior] = load_model(device, arena, options.out / file);
  EXPECT_EQ(model.kind, run.method);
  EXPECT_EQ(model.network.description(), run.network.description());
  EXPECT_EQ(model.stages(), 2);
  EXPECT_EQ(model.settings, posterior->settings());
  int steps = 0;
  for (int size : run.stages.sizes) steps += count_steps(1, size, run.training.batch);
  EXPECT_EQ(model.step, uint32_t(steps));
  double nll = 0;
  for (size_t t = 0; t < data.test.size(); t++) {
    const Images& test = data.test[t];
    Predictor predictor(device, arena, network_factory(model.network), upload_images(device, arena, test, unit_range));
    predictor.look_as(int(t), nullptr);
    const Predictions p = predictor.predict(*posterior, 0, run.samples, seed * 1000003 + uint64_t(steps));
    const Metrics m = evaluate(p.probability, test.labels, 10, p.entropy, p.mutual_information);
    nll += m.nll / double(data.test.size());
    EXPECT_EQ(heads ? last["by_task"][t] : last["test_accuracy"], m.accuracy);
  }
  EXPECT_NEAR(nll, last["test_nll"], 1e-5 * nll);
  if (model.kind != "ffg") return;

  OwnData more;
  more.images = data.test.back();
  more.labelled = true;
  for (const char* rule : {"elbo", "bgd"}) {
    Model from = model;
    from.rule = rule, from.draws = 2;
    if (from.rule == "bgd") from.settings["lr"] = 1;
    UpdateOptions update;
    update.head = heads ? 1 : 0;
    const fs::path out = options.out / (std::string(rule) + ".safetensors");
    const json stage = update_model(device, from, more, out, update);
    EXPECT_EQ(stage["stage"], 3);
    EXPECT_GT(double(stage["kl"]), 0);
    const Model next = read_model(out);
    EXPECT_EQ(next.stages(), 3);
    EXPECT_EQ(next.find_stage(content_hash(more.images)), 3);
    for (const TensorSpec& t : posterior->store().layout().tensors()) {
      const auto was = [&](const char* end) { return model.arrays.at(t.name + end).as<float>(); };
      const auto is = [&](const char* end) { return next.arrays.at(t.name + end).as<float>(); };
      EXPECT_EQ(is(".prior_mean"), was(".mean")) << t.name;
      const bool waits = t.name.starts_with("head0");
      EXPECT_EQ(is(".mean") == was(".mean"), waits) << t.name;
      if (waits) {
        EXPECT_TRUE(close(is(".log_std"), was(".log_std"), {.l2 = 1e-6})) << t.name;
      }
    }
    update.head = heads ? 2 : 1;
    update.overwrite = true;
    EXPECT_THROW(update_model(device, from, more, out, update), InputError);
  }
}

TEST_F(Experiment, SavedModelsGoOn) {
  BATON_NEEDS_DEVICE();
  for (const auto& [kind, settings] : std::vector<std::pair<std::string, json>>{
           {"ffg", json::object()}, {"ft", json::object()}, {"mnf", {{"flow_hidden", 4}}}, {"bgd", {{"draws", 2}}}}) {
    ExperimentRun run = task_run(kind, 3, settings);
    run.stages = split_into_parts(train_images, 2, {3});
    run.inference = Inference::softmax;
    expect_model_goes_on(run, options(kind), experiment_digits(), false);
  }
}

// The precision is in the result and in its models, changes the figures, and is that of what goes on from a model.
TEST_F(TaskExperiment, UnderTf32) {
  BATON_NEEDS_DEVICE();
  ExperimentRun run = task_run("ffg", 3, json::object());
  run.stages = split_into_parts(train_images, 2, {3});
  const auto learn = [&](Precision precision) {
    ExperimentOptions o = options(name(precision));
    o.precision = precision, o.save_models = true;
    return run_experiment(o, experiment_digits(), {run});
  };
  const json fp32 = learn(Precision::fp32), tf32 = learn(Precision::tf32);
  EXPECT_EQ(fp32["precision"], "fp32");
  EXPECT_EQ(tf32["precision"], "tf32");
  const double before = fp32["runs"][0]["stages"][1]["test_nll"], rounded = tf32["runs"][0]["stages"][1]["test_nll"];
  EXPECT_NE(rounded, before);
  EXPECT_NEAR(rounded, before, 0.05);

  const Model model = read_model(folder_ / "tf32" / "ffg_8_seed3.safetensors");
  EXPECT_EQ(model.precision, Precision::tf32);
  EXPECT_EQ(read_model(folder_ / "fp32" / "ffg_8_seed3.safetensors").precision, Precision::fp32);
  OwnData more;
  more.images = generate_digits(20, 7);
  more.labelled = true;
  Device device;
  const auto goes_on_as = [&](Precision precision) {
    Model from = model;
    from.precision = precision;
    const fs::path out = folder_ / (std::string("next_") + name(precision));
    const json stage = update_model(device, from, more, out, {});
    EXPECT_EQ(device.precision(), precision);
    EXPECT_EQ(stage["settings"].value("precision", "fp32"), name(precision));
    return read_model(out);
  };
  const Model next = goes_on_as(Precision::tf32), other = goes_on_as(Precision::fp32);
  EXPECT_EQ(next.precision, Precision::tf32);
  EXPECT_EQ(other.precision, Precision::fp32);
  EXPECT_NE(next.arrays.at("fc1.weight.mean").bytes, other.arrays.at("fc1.weight.mean").bytes);

  // A finished update of another precision is not taken for this one.
  UpdateOptions resume;
  resume.start = UpdateOptions::Start::resume;
  EXPECT_EQ(update_model(device, model, more, folder_ / "next_tf32", resume).value("done_before", false), true);
  EXPECT_THROW(update_model(device, model, more, folder_ / "next_fp32", resume), InputError);
}

TEST_F(Experiment, SavedModelsWithHeadsGoOn) {
  BATON_NEEDS_DEVICE();
  ExperimentData tasks = experiment_digits();
  tasks.set.train = generate_textures(8, 3);
  tasks.test = {generate_textures(3, 4), generate_textures(3, 5)};
  for (const auto& [kind, settings] :
       std::vector<std::pair<std::string, json>>{{"ffg", json::object()}, {"bgd", {{"draws", 1}, {"sigma", 0.02}}}}) {
    ExperimentRun run = task_run(kind, 3, settings);
    run.network = network_spec("task-cnn", 10, {{"heads", 2}, {"dropout", false}});
    run.stages = split_into_parts(8, 2, {3});
    run.stages.heads = {0, 1};
    run.training.batch = 4;
    run.samples = run.stage_samples = 2;
    run.inference = Inference::softmax;
    expect_model_goes_on(run, options(kind), tasks, true);
  }
}

// ----------------------------------------------------------------------------------------------------------- resuming
// Killed when it has just begun, in a prediction, between two runs, in a Fisher information: what is there then goes on
// to the very result.
TEST_F(TaskExperiment, AKilledExperimentGoesOn) {
  BATON_NEEDS_DEVICE();
  const ExperimentData data = experiment_digits();
  std::vector<ExperimentRun> runs = task_runs();
  AtQuestion at;
  const auto count = [&](size_t some) {  // of the first runs alone
    at.nothing();
    run_experiment(options("some"), data, {runs.begin(), runs.begin() + long(some)});
    return at.asked_since_nothing();
  };
  const int one = count(1), two = count(2), fisher = two + 1 + 11;  // after the first 12 steps under EWC
  at.nothing();
  run_experiment(options("whole"), data, runs);
  const int all = at.asked_since_nothing();
  std::vector<int> questions{0, one, two, fisher};
  for (int question = 1; question < all; question += all / 9) questions.push_back(question);
  for (size_t i = 0; i < questions.size(); i++) {
    SCOPED_TRACE(testing::Message() << "killed at question " << questions[i] << " of " << all);
    const std::string name = "killed" + std::to_string(i);
    at.kill(questions[i]);
    // After every epoch, or only where a stage is measured.
    EXPECT_THROW(run_experiment(i % 2 ? saving(name) : options(name), data, runs), Kill);
    EXPECT_TRUE(fs::exists(folder_ / name / "checkpoint"));
    at.nothing();
    run_experiment(options(name, true), data, runs);
    expect_whole(name);
  }
}

// Kills the first of task_runs() once it has done so many of its 36 steps: a graph asks nothing before its first step;
// five draws of one batch ask ten questions, the mean one more, after the first stage about one task, then about two.
void kill_after_step(AtQuestion& at, int step) {
  at.kill(step < 12 ? step - 1 : step < 24 ? 11 + 11 + step - 12 : 11 + 11 + 12 + 20 + step - 24);
}

TEST_F(TaskExperiment, ARunKilledInAStageGoesOn) {
  BATON_NEEDS_DEVICE();
  const ExperimentData data = experiment_digits();
  run_experiment(options("whole"), data, task_runs());
  for (int after : {3, 15, 20, 35}) {
    SCOPED_TRACE(testing::Message() << "killed after step " << after);
    const std::string name = "killed" + std::to_string(after);
    {
      AtQuestion at;
      kill_after_step(at, after);
      EXPECT_THROW(run_experiment(saving(name), data, task_runs()), Kill);
    }
    EXPECT_EQ(fs::exists(checkpoint(name)), after > 6);
    if (after > 6) {
      EXPECT_EQ(load_safetensors(checkpoint(name)).metadata.at("step"), std::to_string(after / 6 * 6));
    }
    run_experiment(options(name, true), data, task_runs());
    expect_whole(name);
  }
}

TEST_F(TaskExperiment, ASignalledExperimentGoesOn) {
  BATON_NEEDS_DEVICE();
  std::vector<ExperimentRun> runs = task_runs(1.0001);
  for (ExperimentRun& r : runs) r.measure_every = 1;
  for (size_t r : {1, 2}) runs[r].stages = permuted(2);
  expect_signals_leave_no_trace(experiment_digits(), runs, SIGINT, 11, 20, 31);
  EXPECT_EQ(result("whole")["runs"][0]["warnings"].size(), 1u);
}

// A warning belongs to the run: resumed after it, the run does not warn again, and its result still tells of it.
TEST_F(TaskExperiment, AWarningIsGivenOnce) {
  BATON_NEEDS_DEVICE();
  const std::vector<ExperimentRun> runs = task_runs(1.0001);  // passed at once
  const ExperimentData data = experiment_digits();
  const json want = run_experiment(options("whole"), data, runs);
  ASSERT_EQ(want["runs"][0]["warnings"].size(), 1u);
  {
    AtQuestion at;
    kill_after_step(at, 15);
    EXPECT_THROW(run_experiment(saving("killed"), data, runs), Kill);
  }
  EXPECT_EQ(run_experiment(options("killed", true), data, runs)["runs"][0]["warnings"], want["runs"][0]["warnings"]);
}

TEST_F(TaskExperiment, AnotherExperimentIsRefused) {
  BATON_NEEDS_DEVICE();
  const ExperimentData data = experiment_digits();
  AtQuestion at;
  run_experiment(options("first run"), data, {task_runs()[0]});
  const int of_first_run = at.asked_since_nothing();
  kill_after_step(at, 15);
  EXPECT_THROW(run_experiment(saving("a"), data, task_runs()), Kill);
  at.nothing();
  const auto refuses = [&](const char* what, auto change) {
    ExperimentOptions other = options("a", true);
    ExperimentData its_data = data;
    std::vector<ExperimentRun> its_runs = task_runs();
    change(other, its_data, its_runs);
    EXPECT_THROW(run_experiment(other, its_data, its_runs), InputError) << what;
  };
  using O = ExperimentOptions&;
  using D = ExperimentData&;
  using R = std::vector<ExperimentRun>&;
  const auto other_lr = [](O, D, R r) { r[2].training.replicas[0].settings["lr"] = 1; };
  refuses("name", [](O x, D, R) { x.experiment = "other"; });
  refuses("data", [](O, D d, R) { d.set.source = "another"; });
  refuses("seed", [](O, D, R r) { r[0].training.replicas[0].seed = 9; });
  refuses("settings", other_lr);
  refuses("epochs", [](O, D, R r) { r[1].training.epochs = 3; });
  refuses("network", [](O, D, R r) { r[1].network.options["hidden"] = {9}; });
  refuses("fewer runs", [](O, D, R r) { r.pop_back(); });
  refuses("their order", [](O, D, R r) { std::swap(r[0], r[1]); });
  const auto other_precision = [](O x, D, R) { x.precision = Precision::tf32; };
  refuses("precision", other_precision);
  EXPECT_NO_THROW(run_experiment(options("a", true), data, task_runs()));

  // Also between two runs, where there is no checkpoint of a run in progress.
  at.kill(of_first_run);
  EXPECT_THROW(run_experiment(options("a"), data, task_runs()), Kill);
  at.nothing();
  refuses("settings", other_lr);
  fs::remove(checkpoint("a"));
  refuses("settings", other_lr);
  refuses("precision", other_precision);
  EXPECT_NO_THROW(run_experiment(options("a", true), data, task_runs()));
}

TEST_F(TaskExperiment, WhatMakesNoSenseIsRefused) {
  const ExperimentData data = experiment_digits();
  const auto refuses = [&](const char* what, const ExperimentData& its_data, const std::vector<ExperimentRun>& runs,
                           bool save_models = false) {
    ExperimentOptions o = options("a");
    o.save_models = save_models;
    EXPECT_THROW(run_experiment(o, its_data, runs), InputError) << what;
    EXPECT_FALSE(fs::exists(o.out)) << what;
  };
  refuses("nothing to run", data, {});
  ExperimentData none = data;
  none.test.clear();
  refuses("no test images", none, task_runs());
  ExperimentData two = data;
  two.test.push_back(two.test[0]);
  refuses("two test sets for three tasks", two, task_runs());
  std::vector<ExperimentRun> runs = task_runs();
  runs[2].stages.sizes[1] = 0;
  refuses("a stage without examples", data, runs);
  runs = task_runs();
  runs[1].training.kind = "bgc";
  refuses("an unknown kind", data, runs);
  runs = part_runs();
  runs[1].training.replicas.push_back({7});
  refuses("two replicas", data, runs);
  runs = part_runs();
  runs[2].pruned = {0.5};
  ASSERT_EQ(runs[2].training.kind, "ffg");
  refuses("a kind that is pruned by baton prune", data, runs);
}

TEST_F(TaskExperiment, ADamagedCheckpointIsRefused) {
  BATON_NEEDS_DEVICE();
  const ExperimentData data = experiment_digits();
  {
    AtQuestion at;
    kill_after_step(at, 8);
    EXPECT_THROW(run_experiment(saving("a"), data, task_runs()), Kill);
  }
  fs::resize_file(checkpoint("a"), fs::file_size(checkpoint("a")) - 1);
  EXPECT_THROW(run_experiment(options("a", true), data, task_runs()), InputError);
  for (const char* text : {"{\"run\": 1", "[]"}) {
    std::ofstream(folder_ / "a" / "checkpoint" / "experiment.json") << text;
    EXPECT_THROW(run_experiment(options("a", true), data, task_runs()), InputError);
  }
}

}  // namespace
}  // namespace baton::test
