"""Names whose use vulture cannot see; a comment above each group names the user."""

_ = object()

# vLLM calls these, or passes these arguments, by name.
CpuEnginePlatform
ReplayTokens
ReplayTokensV2
SparseCPUWorker
SparseGPUWorker
SpecPrefillConnector
_.abort_requests_async
_.add_lora
_.add_request_async
_.aggregate
_.apply
_.build_connector_meta
_.build_connector_worker_meta
HybridConnector  # vLLM imports it by name
_.clear_cache
_.data_parallel_rank
_.dead_error
_.delay_iterations
_.disable_sliding_window
_.do_log_stats
_.engine_ranks_managed
_.errored
_.get_handshake_metadata
_.get_num_new_matched_tokens
_.get_output_async
_.get_supported_tasks
_.get_supported_tasks_async
_.get_transfer_results
_.has_pending_push_work
_.intermediate_tensors
_.is_argmax_invariant
_.is_paused
_.is_sleeping
_.is_stopped
_.is_tracing_enabled
_.kv_hints
_.level
_.max_iterations
_.middleware_stack
_.mode
_.notify_kv_transfer_request_rejected
_.on_new_request
_.pause_generation
_.pooling_params
_.profile_prefix
_.ray_device_key
_.ray_noset_device_env_vars
_.reasoning_ended
_.reasoning_parser_kwargs
_.register_kv_caches
_.release_kv_cache_memory
_.request_finished
_.requires_piecewise_for_cudagraph
_.reset_connector
_.reset_encoder_cache
_.reset_mm_cache
_.reset_prefix_cache
_.reset_running_requests
_.resources
_.resume_generation
_.save_kv_layer
_.session_id
_.skip_special_tokens
_.set_xfer_handshake_metadata_pp_aware
_.should_exit
_.stages_layers
_.start_load_kv
_.start_profile
_.stop_profile
_.tags
_.tokenization_kwargs
_.trace_headers
_.request_finished_all_groups
_.update_connector_output
_.update_state
_.update_state_after_alloc
_.wait_for_layer_load
_.wait_for_save
_.wake_up

# Ray Serve calls these by name.
_.Generate
_.choose_replicas
_.initialize_state
_.on_request_routed
_.on_request_completed
_.should_backoff
_.record_autoscaling_stats
_.record_replica_metadata
_.self_test  # called by the gateway
SloPolicy
build

# Protobuf fields, set by name.
_.completion_tokens
_.stop_string
_.stop_token_id

# Shipped fakes: tests of anything above the ports use them.
FakeDecoder
FakePrefiller
FakeSpeculator
_.calls
_.closed
_.released
_.wait_until_idle

# The support of a model: the modes that pipelines choose by.
_.hands_over
_.keeps_positions

# Fields that are read as a whole (`asdict`), protocols' parameters, and the like.
_.atexit  # of weakref.finalize
_.bytes_used
_.add_generation_prompt
_.add_special_tokens
_.dense_right
_.needle_kept
_.needle_kept_by_random
_.opened_total
_.pre_tokenizer
_.pruned_right
_.pulled_total
_.random_right
_.released_total
_.traceback
_.versions
bar_chart
_.samples_seen
_.timeouts  # read by name
_.p90  # read by dataclasses.asdict
_.output_tokens_per_s
_.close_s  # read by name

# vLLM's API server calls it by name.
_.check_admission

# Serve calls these by name; logging reads these.
_.Check
_.List
_.reconfigure
setup
_.exc_text
_.levelname
_.levelno
_.msg
_.encode_special_tokens  # tokenizers reads it

# vLLM's runner and sampler read these.
_.effective_drafter_max_model_len
_.logitsprocs
_.prompt_logprob_token_ids
_.skip_reading_prefix_cache
_.logitsprocs_need_output_token_ids

# Of the interface of asynchronous generators.
_.aclose
_.asend

# services/deployment/file.py, which is left out, calls it.
gpu_fault
