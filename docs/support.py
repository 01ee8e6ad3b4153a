"""Write support.md: python docs/support.py. Every line names the tests that hold it; tests/test_docs.py compares.

"yes" is the backend's own kernels, "plain" ordinary PyTorch, right and differentiable but slower, "no" an error in one
sentence. A test is FILE::NAME without "test_" and ".py".
"""

# ruff: noqa: E501 - a line is a line of the page
from pathlib import Path

HEAD = """# What is supported

Written by `docs/support.py`. "yes" is the backend's own kernels. "plain" is ordinary PyTorch, right and differentiable but slower.
"no" is an error in one sentence. Each line names the tests that hold it. The `triton` backend is tested in Triton's interpreter
and by compiling its kernels; what of the suite ran on a GPU is in
[measurements](inside/measurements.md#what-ran-on-a-gpu).
"""
YES, PLAIN, NO = ("yes",) * 3, ("plain",) * 3, ("no",) * 3
# Section -> (what, (cpu, triton, torch), tests)
BACKENDS = {
    "Dtypes of x": [
        ("float32, float64, bfloat16, float16", YES, "ops::shrink_shapes fuzz::random_standard_gates triton::fused_gate_in_other_dtypes"),
        ("integer, bool, complex", NO, "errors::features"),
        ("residual of another dtype", YES, "pinned::the_residual_promotes_as_in_torch"),
        ("a gate of another dtype", YES, "pinned::the_gate_receives_its_own_dtype"),
    ],
    "Layouts and shapes": [
        ("contiguous, channels_last, transposed, sliced, padded, at an odd offset", YES,
         "layouts::every_pair_of_layouts layouts::one_allocation_each_way_and_no_copy triton::fused_gate_in_any_layout"),
        ("expanded", YES, "pinned::ambiguous_strides"),
        ("1 to 6 spatial dimensions", YES, "layouts::more_spatial_dimensions_in_any_order"),
        ("empty, of length 1, of any length", YES, "pinned::empty_tensors pinned::lengths_of_one"),
        ("more than 2^31 elements", YES, "big::forward triton_big::many_rows_and_a_long_one"),
        ("strides beyond 2^31", YES, "big::strides_whose_multiples_do_not_fit_32_bits "
         "triton_big::a_stride_whose_multiples_do_not_fit_32_bits"),
        ("tau along the spatial dimensions (`soft_threshold`)", YES, "ops::tau_that_varies_along_space"),
        ("lazily negated", PLAIN, "transforms::lazily_negated_tensors"),
        ("meta, fake tensors", PLAIN, "transforms::meta_tensors transforms::fake_tensors"),
        ("sparse, nested", NO, "sharing::other_layouts_are_refused"),
    ],
    "The operator": [
        ("any gate, average channel, sample, none", YES, "ops::shrink_arguments"),
        ("standard gate fused with the step", ("yes", "yes", "no: called"), "fuzz::random_standard_gates triton::fused_gate"),
        ("residual, in place, return_tau", YES, "ops::shrink_lengths_with_residual"),
        ("in place in training, on a view", YES, "sharing::inplace_on_a_view"),
        ("first derivatives", YES, "ops::shrink_arguments"),
        ("second and higher derivatives", PLAIN, "ops::full_jacobians"),
        ("NaN, Inf, zeros, ties, negative tau as pinned", YES, "pinned::special_values"),
        ("3 bits an element kept for backward", ("yes", "yes", "with save=\"memory\""), "autograd_memory::saved_bytes_of_shrink"),
        ("hard and leaky thresholds, the gate called", YES, "thresholds::shrink"),
        ("`squeeze_excite`, the gate called", YES, "squeeze_excite::shapes"),
        ("`batch_norm_relu` and its derivative", YES, "batch_norm_relu::shapes batch_norm_relu::layouts triton_norm::as_batch_norm"),
        ("its second derivatives", PLAIN, "batch_norm_relu::numerical_derivatives"),
        ("same bits from run to run", ("yes, for any number of threads", "yes", "as torch"),
         "reliability::neither_threads_nor_repetition_change_a_bit reliability::deterministic_algorithms_are_all_there_is"),
        ("several Python threads", ("yes", "not run yet", "yes"), "reliability::one_module_in_several_threads"),
        ("out of memory is an exception", ("yes", "not run yet", "as torch"),
         "reliability::running_out_of_memory_leaves_the_process_usable"),
        ("sanitizers", ("clean under ASan and UBSan", "memcheck on an H200, of earlier kernels", "no code of ours"),
         "sanitize::kernels_are_clean_under_sanitizers gpu_suite::the_steps"),
    ],
}  # fmt: skip
# Section -> (what, how, tests)
OTHERS = {
    "Around the operator": [
        ("torch.compile, fullgraph", "plain, or our kernels where a backend is forced", "transforms::no_graph_break"),
        ("one graph for every batch and length", "the same", "deploy::one_graph_for_every_batch_and_length"),
        ("torch.export", "plain: aten operations only",
         "deploy::an_exported_network_holds_aten_ops_and_runs_without_the_package"),
        ("ONNX, onnxruntime", "plain: ONNX's own operators only", "deploy::onnxruntime_gives_the_same_numbers"),
        ("torch.func: grad, vmap, jvp, hessian", "plain", "transforms::transforms transforms::vmap"),
        ("forward-mode AD", "plain", "transforms::forward_mode"),
        ("torch.jit.trace, torch.jit.script", "plain", "sharing::jit_trace scripting::modules"),
        ("CUDA graphs", "our kernels; ran on an H100", "gpu::a_training_step_in_a_cuda_graph"),
        ("a whole training step as one, `dk.graphed`", "our kernels; ran on an H100", "graphs::the_same_weights"),
        ("autocast, GradScaler", "our kernels; the fused gate computes in float32",
         "transforms::autocast distributed::autocast_and_a_gradient_scaler"),
        ("activation checkpointing, saved-tensor hooks", "our kernels",
         "transforms::activation_checkpointing transforms::saved_tensors_on_another_place"),
        ("DDP, two processes", "our kernels", "distributed::two_processes_equal_one_on_the_whole_batch"),
        ("SyncBatchNorm in the gate", "our kernels, the gate called", "distributed::sync_batch_norm_reaches_the_gate"),
        ("FSDP2", "our kernels", "distributed::fully_sharded"),
        ("DataLoader workers, fork", "our kernels",
         "deploy::operators_in_the_workers_of_a_data_loader deploy::a_fork_after_use"),
        ("pickle, deepcopy, checkpoints of the ports", "-", "modules::copies modules::state_dict_keys"),
        ("modules of other people, by `convert`", "our kernels",
         "convert::found_by_what_it_computes_and_equal_in_every_respect"),
        ("mypy, pyright", "user code is accepted", "typing::user_calls"),
        ("`use_backend` as statement, block, decorator", "the process's choice", "use_backend::a_statement_holds_from_its_call_on"),
        ("timm's `attn_layer`", "our kernels", "timm::networks_train"),
    ],
    "Versions and machines": [
        ("torch", "2.6 or later; before 2.10 the CPU kernels use one thread, before 2.7 a compiled graph is always plain",
         "workflows::ci_runs_what_the_local_ci_runs layouts::the_kernels_use_as_many_threads_as_torch_may"),
        ("Python", "3.10 to 3.14", "workflows::ci_runs_what_the_local_ci_runs"),
        ("Linux x86-64", "portable, AVX2 and AVX-512 kernels, chosen at import", "fuzz::instruction_sets_agree"),
        ("Linux on other processors", "portable kernels; not run yet", "fuzz::instruction_sets_agree"),
        ("macOS, Windows, no compiler", "pure Python: the `torch` backend", "install::pure_python_without_a_compiler"),
        ("Triton", "3.5 or later", "triton::any_gate"),
        ("NVIDIA compute capability 8.0, 9.0, 10.0", "compiled without a GPU; on 9.0 they ran, on the others not yet",
         "triton_lowering::nothing_spills_and_a_program_fits gpu::shrink"),
        ("AMD gfx942", "the kernels compile; not chosen", "triton_lowering::the_table_holds_every_launch"),
        ("without any optional package", "the package imports and works, and names what is missing",
         "import::import_brings_no_triton_no_extras_and_no_gpu_and_the_subpackages_at_their_first_use install::demo_runs_from_the_pure_install_and_names_the_extra"),
    ],
    "Training and data": [
        ("killed or interrupted anywhere, resumed", "the same bits as without, on a CPU",
         "train::command_killed_inside_an_epoch_and_resumed train::a_signal_stops_after_the_step_and_the_run_continues_exactly"),
        ("checkpoints", "load with `weights_only=True`; a damaged one is named",
         "train::checkpoints_hold_tensors_and_plain_values_only train::a_damaged_checkpoint_is_named"),
        ("several processes on CPUs (gloo)", "as one process up to rounding, batch statistics included",
         "train_ranks::two_processes_train_as_one train_ranks::command_under_torchrun"),
        ("several processes on GPUs (nccl)", "SyncBatchNorm; not run yet", "distributed::sync_batch_norm_over_two_ranks"),
        ("CWRU .mat files", "12 kHz, and 48 kHz decimated after the split in time",
         "data::cwru_normal_baseline_is_brought_to_12_khz data::cwru_decimation_mixes_no_sample_across_the_split"),
        (".mat files of version 7.3", "by h5py", "data_matlab::version_7_3_is_read_as_the_others_are"),
        ("folders of .wav files", "takes or speakers held out; noise before the log-mel image",
         "data_readers::speech_holds_speakers_out "
         "data_readers::log_mel_is_fitted_to_clean_training_clips_and_noise_raises_it"),
        ("samples of .wav files", "PCM of 8 to 32 bits and float, channels averaged",
         "data_wav::samples_of_every_format data_wav::channels_are_averaged"),
        ("your own recordings, in class folders or a table", "windows split in time; a fault is a sentence with the file",
         "own_data::no_window_crosses_the_border_and_none_shares_a_sample_with_the_other_side own_data::faults_of_a_folder_are_one_sentence_that_names_the_file"),
        ("predictions of files that were never seen", "on a CPU and a GPU, at another sampling rate too",
         "predict::every_window_and_the_file_have_a_line predict::another_rate_is_resampled_and_said"),
        ("a run as a model, `train.load`", "the checkpoint alone is enough", "predict::the_checkpoint_alone_is_enough"),
        ("a run as an ONNX file", "compared with the model when it is written", "predict::a_run_as_an_onnx_file"),
        ("hidden files, companions of macOS and Synology", "passed over",
         "data_wav::companion_and_hidden_files_are_passed_over"),
        ("idx files of MNIST and its relatives", "the official split; the labels that occur are the classes",
         "data_readers::idx_reads_the_official_split data_readers::idx_labels_that_occur_are_the_classes"),
    ],
}  # fmt: skip


def tests(names: str) -> str:
    """file::name -> `test_file.py::test_name`."""
    return ", ".join(f"`test_{file}.py::test_{name}`" for file, name in (one.split("::") for one in names.split()))


def support() -> str:
    parts = [HEAD]
    for title, lines in BACKENDS.items():
        rows = [f"| {what} | {' | '.join(on)} | {tests(names)} |" for what, on, names in lines]
        parts.append(
            "\n".join([f"## {title}\n", "| | `cpu` | `triton` | `torch` | tests |", "|---|---|---|---|---|", *rows, ""])
        )
    for title, lines in OTHERS.items():
        rows = [f"| {what} | {how} | {tests(names)} |" for what, how, names in lines]
        parts.append("\n".join([f"## {title}\n", "| what | how | tests |", "|---|---|---|", *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("support.md").write_text(support(), encoding="utf-8")
