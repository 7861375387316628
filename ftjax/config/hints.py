"""Names that users of other tools type (TRL and Hugging Face's Trainer, LLaMA-Factory, Axolotl,
Tunix, MaxText, torchtune), and the key that has that meaning here.

A row is (names, key, note). A name with a dot matches that key alone; one without matches the last
part of any key. The note states where the meaning differs; a row without a key has a note on
what to do instead.
"""

import re
from collections.abc import Iterable

from ftjax.config import algorithms, choices

_PER_DEVICE = 'It is global: per update, over all devices and micro-batches'
_LORA = 'adapters are set by the section lora: rank, alpha, targets, dropout and others'
_BASE = 'lora.base says how the frozen base is held: float32, bfloat16, int8 or nf4'
_AXES = 'the axes are mesh.data, fsdp, context, tensor and expert, over all devices of all slices'
_IN_STEPS = 'It counts updates, not a share of them'
_EVERY_STEPS = 'It counts updates; the last one is always included'


def _one_of(names: Iterable[str]) -> str:
  *most, last = names
  return f'{", ".join(most)} or {last}'


ROWS = (
  # Model.
  (('model.name', 'model_name', 'model_name_or_path', 'model_path', 'base_model', 'model_id',
    'pretrained_model_name_or_path', 'model.name_or_path', 'load_parameters_path',
    'checkpoint_path', 'model.id', 'hf_path', 'pretrained'), 'model.path', ''),
  (('tokenizer', 'tokenizer_path', 'tokenizer_name', 'tokenizer_name_or_path'),
   'model.path', 'The tokenizer is the one in the folder of the model'),
  (('chat_template', 'template', 'chat_template_path', 'chat_template_jinja'),
   'data.chat_template', "A file; without it the model's own template is used"),
  (('tokens', 'added_tokens', 'new_tokens', 'add_tokens'), 'model.add_tokens', ''),
  (('special_tokens', 'additional_special_tokens', 'new_special_tokens', 'extra_special_tokens',
    'add_special_tokens'), 'model.add_special_tokens', ''),
  (('init_special_tokens', 'new_special_tokens_config', 'new_embeddings_init'),
   'model.init_tokens', '(new token, text) pairs'),
  (('pad_to_multiple_of', 'resize_token_embeddings_to_32x', 'resize_vocab',
    'make_vocab_size_divisible_by'), 'model.vocab_multiple', 'Tables are padded in memory alone'),
  (('bf16', 'fp16', 'pure_bf16', 'mixed_precision', 'dtype', 'compute_type', 'activation_dtype',
    'tf32'), 'model.compute_dtype', "'bfloat16' or 'float32'"),
  (('torch_dtype', 'weight_dtype', 'model_dtype'),
   'model.param_dtype', "It holds master parameters: 'float32' or 'bfloat16'"),
  (('gradient_checkpointing', 'remat_policy', 'activation_checkpointing', 'rematerialize',
    'enable_activation_checkpointing', 'use_remat'), 'remat', "'none', 'dots' or 'full'"),
  (('attn_implementation', 'flash_attention', 'flash_attn', 'use_flash_attention_2', 'attention'),
   None, 'the attention kernel is chosen for the device: leave it out'),
  (('torch_compile', 'jit'), None, 'every step is compiled: leave it out'),
  (('load_in_4bit', 'load_in_8bit', 'quantization_bit', 'quantization', 'bnb_4bit_quant_type'),
   'lora.base', 'int8 or nf4: how the frozen base under an adapter is held'),
  (('trust_remote_code',), None, 'code from model folders is never run: leave it out'),
  # Length of training.
  (('max_steps', 'num_train_steps', 'train_steps', 'total_steps', 'num_steps', 'training_steps',
    'max_train_steps', 'num_training_steps'), 'steps', ''),
  (('num_train_epochs', 'num_epochs', 'max_epochs', 'n_epochs', 'train_epochs'), 'epochs', ''),
  (('per_device_train_batch_size', 'per_device_batch_size', 'micro_batch_size', 'train_batch_size',
    'train_micro_batch_size_per_gpu', 'per_gpu_train_batch_size', 'global_batch_size', 'bsz',
    'global_batch_size_to_train_on', 'mini_batch_size', 'train_micro_batch_size'),
   'batch_size', _PER_DEVICE),
  (('gradient_accumulation_steps', 'gradient_accumulation', 'accumulate_grad_batches', 'grad_acc',
    'accumulation_steps', 'grad_accumulation_steps', 'num_micro_batches'),
   'grad_accum', 'It divides batch_size into so many micro-batches and does not multiply it'),
  (('max_seq_length', 'max_seq_len', 'max_length', 'cutoff_len', 'sequence_len', 'sequence_length',
    'max_target_length', 'block_size', 'model_max_length', 'context_length', 'max_sequence_length'),
   'seq_len', 'Tokens of a packed sequence; data.on_overlength decides about longer examples'),
  (('random_seed', 'data_seed', 'data_shuffle_seed'), 'seed', ''),
  (('output_dir', 'base_output_directory', 'run_dir', 'save_dir', 'checkpoint_dir', 'workdir',
    'output_path', 'log_dir', 'logging_dir'),
   None, 'the folder of a run is the flag --workdir=DIR'),
  (('run_name', 'experiment_name', 'overwrite_output_dir'),
   None, 'the folder of a run is the flag --workdir=DIR'),
  (('resume_from_checkpoint', 'resume', 'auto_resume_from_checkpoints', 'enable_checkpointing'),
   None,
   'a run always keeps checkpoints, and the same command with the same --workdir continues it'),
  (('adapter_name_or_path', 'load_from_checkpoint', 'load_full_state_path', 'warm_start'),
   'init_from', 'The workdir of an earlier run'),
  # Data.
  (('dataset', 'dataset_name', 'train_file', 'dataset_path', 'datasets', 'train_data', 'data.path',
    'train_files', 'data_path', 'train_dataset', 'data_files', 'hf_train_files', 'data.dataset',
    'dataset_type', 'dataset_dir', 'data_dir'),
   'data.train', 'path[::format][@weight], several separated by commas'),
  (('eval_dataset', 'validation_file', 'val_file', 'eval_file', 'val_data', 'test_datasets',
    'eval_data', 'hf_eval_files', 'validation_data'), 'data.eval', ''),
  (('val_set_size', 'val_size', 'validation_split', 'eval_split', 'test_size',
    'validation_split_percentage'), 'data.eval_fraction', 'A share between 0 and 1'),
  (('packing', 'sample_packing', 'neat_packing', 'eval_packing', 'pack_sequences'),
   'data.packing', ''),
  (('train_on_inputs', 'train_on_prompt'), 'data.loss_on', "'all' trains on every token"),
  (('assistant_only_loss', 'completion_only_loss', 'mask_history', 'train_on_completion_only',
    'sft_train_on_completion_only', 'roles_to_train'),
   'data.loss_on', "'assistant' (every turn), 'completion' (the last one) or 'all'"),
  (('truncation_mode', 'truncation', 'truncation_side'), 'data.on_overlength', ''),
  (('dataset_prepared_path', 'tokenized_path'), 'data.cache', ''),
  (('dataset_text_field', 'prompt_field', 'formatting_func', 'data.format'),
   'data.train', 'A format is named in it, as in rows.jsonl::alpaca'),
  (('shuffle', 'enable_data_shuffling', 'dataloader_num_workers', 'preprocessing_num_workers',
    'dataset_num_proc', 'dataloader_drop_last'),
   None, 'rows are always shuffled by the seed and prepared ahead: leave it out'),
  (('max_samples', 'max_train_samples', 'limit'), None, 'give a smaller file in data.train'),
  # Optimizer.
  (('learning_rate', 'rate', 'peak_learning_rate', 'peak_lr', 'base_lr', 'actor_learning_rate',
    'max_lr'), 'optim.lr', ''),
  (('optim', 'optimizer', 'opt_type', 'optimizer.type', 'optimizer_type', 'optim.type', 'opt'),
   'optim.name', _one_of(choices.OPTIMIZERS)),
  (('optim_bits', 'adam_8bit', 'use_8bit_adam', 'state_dtype', 'moment_dtype', 'mu_dtype'),
   'optim.moments', _one_of(choices.CHOICES['optim.moments'])),
  (('stochastic_rounding', 'bf16_stochastic_round', 'use_stochastic_rounding'),
   'optim.rounding', _one_of(choices.CHOICES['optim.rounding'])),
  (('lr_scheduler_type', 'lr_scheduler', 'learning_rate_schedule', 'lr_schedule', 'scheduler',
    'schedule_type', 'lr_decay_style', 'decay_type', 'lr_schedule_type'),
   'optim.schedule', f'{_one_of(choices.SCHEDULES)}; reduce_lr_on_plateau is optim.plateau_factor'),
  (('warmup_ratio', 'warmup_steps_fraction', 'warmup_fraction', 'warmup', 'num_warmup_steps',
    'lr_warmup_steps', 'warmup_proportion', 'lr_warmup_ratio', 'learning_rate_warmup'),
   'optim.warmup_steps', _IN_STEPS),
  (('min_lr', 'min_lr_ratio', 'cosine_min_lr_ratio', 'learning_rate_final_fraction', 'end_lr',
    'min_lr_rate', 'cosine_learning_rate_final_fraction', 'lr_end', 'final_lr', 'end_value'),
   'optim.end_fraction', 'A share of optim.lr'),
  (('decay_ratio', 'num_decay_steps', 'cooldown_steps', 'wsd_decay_steps'),
   'optim.decay_steps', _IN_STEPS),
  (('reduce_lr_on_plateau', 'lr_on_plateau', 'plateau', 'lr_reduce_factor', 'reduce_on_plateau'),
   'optim.plateau_factor', 'The rule multiplies the schedule of optim.schedule'),
  (('reduce_lr_patience', 'lr_patience', 'lr_scheduler_patience'), 'optim.plateau_patience',
   'It counts one more than in torch: 1 is patience=0 there'),
  (('wd', 'adam_weight_decay', 'decoupled_weight_decay'), 'optim.weight_decay', ''),
  (('adam_beta1', 'beta1', 'adam_b1', 'momentum', 'betas', 'adam_betas'), 'optim.b1', ''),
  (('adam_beta2', 'beta2', 'adam_b2'), 'optim.b2', ''),
  (('adam_epsilon', 'adam_eps', 'epsilon', 'eps_root', 'adam_eps_root', 'optimizer_eps'),
   'optim.eps', ''),
  (('max_grad_norm', 'gradient_clip_val', 'gradient_clipping', 'grad_clip', 'clip_grad',
    'grad_norm', 'gradient_clipping_threshold', 'clip_grad_norm', 'max_gradient_norm',
    'grad_clip_norm'), 'optim.clip_norm', '0 clips nothing'),
  (('ema', 'ema_rate', 'use_ema'), 'optim.ema_decay', ''),
  (('sam', 'sam_rho', 'rho', 'use_sam'), 'optim.sam_radius', 'Its rho; 0.05 is usual'),
  (('freeze', 'freeze_trainable_layers', 'unfrozen_parameters', 'trainable_parameters_mask',
    'freeze_modules', 'finetuning_type'),
   'optim.freeze', "A table such as (('embed/w', True), ('.*', False))"),
  (('layerwise_lr_decay', 'layer_wise_lr_decay', 'llrd', 'lr_layer_decay'),
   'optim.layer_decay', ''),
  (('gradual_unfreezing', 'unfreeze_every_n_steps'), 'optim.unfreeze_every', 'In updates'),
  (('lr_multiplier', 'embedding_learning_rate'),
   'optim.multipliers', "A table such as (('embed/w', 0.1), ('.*', 1.0))"),
  (('label_smoothing_factor',), 'loss.label_smoothing', ''),
  (('teacher_model', 'teacher_model_name_or_path', 'teacher_path', 'teacher_model_path'),
   'distill.teacher', "With algorithm='distill'"),
  (('kd_alpha', 'distill_alpha', 'distillation_alpha'), 'distill.share', ''),
  (('kd_temperature', 'distill_temperature'), 'distill.temperature', ''),
  (('topk_logits_k', 'kd_top_k', 'teacher_top_k', 'kd_online_topk'), 'distill.top_k',
   'Of the files that ftjax.teacher writes'),
  (('on_policy_fraction', 'student_data_fraction'), 'distill.on_policy',
   "With algorithm='distill'"),
  (('step_separator', 'step_token'), 'prm.separator', "With algorithm='prm'"),
  (('max_source_length', 'max_input_length', 'source_max_len'), 'seq2seq.source_len',
   "With algorithm='seq2seq'; seq_len is the length of the target"),
  (('generation_num_beams', 'num_beams', 'beam_size'), 'eval.num_beams', 'Of encoder-decoders'),
  (('noise_density', 'span_mask_ratio'), 'span_corruption.density', ''),
  (('mean_noise_span_length', 'mean_span_length'), 'span_corruption.mean_length', ''),
  (('use_dft_loss', 'use_dft', 'dft', 'dft_loss'), 'loss.dynamic', ''),
  (('r_drop', 'rdrop', 'r_drop_alpha', 'rdrop_alpha'), 'loss.r_drop', ''),
  (('neftune_noise_alpha', 'neftune_alpha'), 'loss.neftune', ''),
  (('router_aux_loss_coef', 'moe_aux_loss_coeff', 'aux_loss_alpha', 'load_balance_loss_weight',
    'output_router_logits', 'router_aux_loss_weight'), 'moe.balance',
   'It is added without being asked, with the factor of config.json'),
  (('z_loss_multiplier', 'z_loss_weight', 'zloss'), 'loss.z_loss', ''),
  # Preference and rewards.
  (('loss_type', 'pref_loss', 'dpo_loss_type', 'preference_loss'),
   'dpo.loss', 'grpo.advantage chooses the form of GRPO'),
  (('beta', 'pref_beta', 'dpo_beta', 'orpo_alpha', 'rl_beta'),
   'dpo.beta', 'For GRPO and PPO the weight of the KL term is policy.kl_coef'),
  (('dpo_label_smoothing', 'flip_prob'), 'dpo.label_smoothing', ''),
  (('f_divergence_type',), 'dpo.divergence', ''),
  (('f_alpha_divergence_coef',), 'dpo.divergence_alpha', ''),
  (('discopop_tau',), 'dpo.tau', ''),
  (('simpo_gamma', 'gamma_beta_ratio', 'simpo_margin'), 'dpo.gamma', ''),
  (('rpo_alpha', 'pref_ftx', 'cpo_alpha', 'sft_weight', 'nll_weight'), 'dpo.nll_coef', ''),
  (('desirable_weight', 'kto_chosen_weight'), 'dpo.desirable', ''),
  (('undesirable_weight', 'kto_rejected_weight'), 'dpo.undesirable', ''),
  (('precompute_ref_log_probs', 'precompute_ref_batch_size'),
   'dpo.reference', "'cache' computes the reference's log-probs once"),
  (('ref_model', 'reference_model', 'ref_model_path', 'ref_path'),
   'model.path', 'The reference is the model that training starts from'),
  (('center_rewards_coefficient', 'centering_coefficient'), 'reward_model.centring', ''),
  (('stage', 'rl', 'trainer_type', 'task_type', 'train_type', 'rl_algorithm', 'algo', 'method'),
   'algorithm', _one_of(algorithms.ALGORITHMS)),
  # Rollouts.
  (('num_generations', 'group_size', 'num_samples_per_prompt', 'n_samples_per_prompt', 'rloo_k',
    'num_return_sequences', 'n_rollouts', 'num_rollouts'), 'rollout.group', ''),
  (('max_completion_length', 'max_response_length', 'response_length', 'max_tokens_to_generate',
    'total_generation_steps', 'generate_max_len', 'rollout.max_new_tokens', 'max_gen_len'),
   'rollout.max_tokens', ''),
  (('max_prompt_length', 'prompt_length', 'max_prompt_len'),
   'seq_len', 'A prompt may have seq_len - rollout.max_tokens tokens'),
  (('max_new_tokens', 'generation_max_length', 'eval.max_new_tokens'),
   'eval.max_tokens', 'Of completions at an evaluation; rollout.max_tokens is the one of rollouts'),
  (('temp', 'sampling_temperature', 'decode_sampling_temperature'), 'rollout.temperature', ''),
  (('reward_funcs', 'reward_functions', 'reward_fn', 'reward_function', 'rewards',
    'reward_weights'),
   'rollout.rewards', "(name, weight) pairs, or a text like 'math@1,format:think'"),
  (('reward_model_path', 'reward_model_name', 'reward_model.path'), 'rollout.reward_model', ''),
  (('stop_strings', 'stop_token', 'stop_sequences', 'stop_words', 'rollout.stop_token'),
   'rollout.stop', ''),
  (('num_iterations', 'num_ppo_epochs', 'ppo_epochs', 'update_epochs', 'mu'),
   'rollout.updates', ''),
  (('num_mini_batches', 'num_minibatches'), 'rollout.minibatches', ''),
  (('dynamic_sampling', 'max_resample_times', 'dapo_dynamic_sampling'), 'rollout.redraws', ''),
  (('kl_coef', 'kl_coeff', 'init_kl_coef', 'kl_penalty_coef', 'kl_loss_coef', 'grpo.beta',
    'ppo.beta', 'policy.beta', 'grpo_beta', 'kl_beta'), 'policy.kl_coef', ''),
  (('kl_estimator', 'kl_penalty', 'kl_loss_type'), 'policy.kl', _one_of(choices.DIVERGENCES)),
  (('cliprange', 'clip_epsilon', 'clip_ratio', 'clip_range', 'epsilon_low', 'grpo.epsilon',
    'ppo_clip', 'clip_ratio_low'), 'policy.clip_low', 'policy.clip_high is the upper side'),
  (('epsilon_high', 'clip_ratio_high', 'clip_higher'), 'policy.clip_high', ''),
  (('importance_sampling_level',), 'policy.level', 'token, sequence (GSPO) or trajectory'),
  (('entropy_coeff', 'ent_coef', 'entropy_bonus'), 'policy.entropy_coef', ''),
  (('advantage_estimator', 'adv_estimator', 'scale_rewards'), 'grpo.advantage', ''),
  (('overlong_buffer', 'overlong_buffer_len', 'soft_punish_cache'), 'policy.overlong', ''),
  (('vf_coef', 'value_loss_coef', 'vf_loss_coeff'), 'ppo.value_coef', ''),
  (('cliprange_value', 'value_clip_range', 'clip_range_vf'), 'ppo.value_clip', ''),
  (('gae_lambda', 'lambd', 'lmbda', 'gae_lam'), 'ppo.lam',
   "The lmbda of GKD is distill.on_policy"),
  (('whiten_rewards', 'whiten_advantages', 'normalize_advantages'), 'ppo.whiten', ''),
  (('critic_model', 'value_model', 'critic_path', 'value_model_path'), 'ppo.value_from', ''),
  (('use_vllm', 'vllm_mode', 'vllm_gpu_memory_utilization', 'rollout.engine'),
   None, 'rollouts are sampled on the devices of the run: leave it out'),
  # Devices.
  (('ici_data_parallelism', 'data_parallel_size', 'dp_size', 'data_parallelism', 'dp'),
   'mesh.data', ''),
  (('ici_fsdp_parallelism', 'fsdp', 'fsdp_config', 'fsdp_size', 'deepspeed', 'fsdp_parallelism',
    'fsdp_transformer_layer_cls_to_wrap', 'deepspeed_config'),
   'mesh.fsdp', '-1 takes all devices that the other axes leave'),
  (('ici_tensor_parallelism', 'tensor_parallel_size', 'tp_size', 'tensor_parallelism', 'tp',
    'model_parallel_size'), 'mesh.tensor', ''),
  (('ici_sequence_parallelism', 'ici_context_parallelism', 'sequence_parallel_size', 'cp_size',
    'context_parallel_size', 'sequence_parallel_degree', 'context_parallelism'),
   'mesh.context', ''),
  (('ici_expert_parallelism', 'expert_parallel_size', 'ep_size', 'expert_parallelism'),
   'mesh.expert', ''),
  (('dcn_data_parallelism', 'dcn_fsdp_parallelism', 'dcn_tensor_parallelism', 'num_slices',
    'dcn_pipeline_parallelism', 'ici_pipeline_parallelism', 'pipeline_parallel_size'), None, _AXES),
  (('mesh_shape', 'ici_mesh_shape', 'mesh_axes', 'parallelism'),
   None, 'set mesh.data, mesh.fsdp, mesh.context, mesh.tensor and mesh.expert; one may be -1'),
  (('num_gpus', 'num_devices', 'n_gpu', 'ngpu', 'world_size', 'nproc_per_node'),
   None, 'all devices that jax sees are used'),
  # Checkpoints, evaluation, logging.
  (('save_steps', 'checkpoint_period', 'save_interval', 'save_every', 'save_every_n_steps',
    'checkpoint_every', 'save_interval_steps', 'save_strategy'), 'checkpoint.every', _EVERY_STEPS),
  (('save_total_limit', 'max_to_keep', 'max_num_checkpoints_to_keep', 'keep_last_n_checkpoints'),
   'checkpoint.keep', 'The best one stays as well'),
  (('metric_for_best_model', 'best_model_metric'), 'checkpoint.best_metric', ''),
  (('load_best_model_at_end',), 'checkpoint.best_metric', 'Setting it exports the best checkpoint'),
  (('greater_is_better',), 'checkpoint.best_mode', "'min' or 'max'"),
  (('early_stopping_patience', 'early_stopping'), 'checkpoint.patience', 'It counts evaluations'),
  (('eval_steps', 'eval_interval', 'eval_every', 'evaluation_strategy', 'eval_strategy',
    'eval_freq', 'evals_per_epoch', 'eval_every_n_steps', 'val_check_interval', 'eval_delay'),
   'eval.every', _EVERY_STEPS),
  (('per_device_eval_batch_size', 'eval_batch_size', 'eval_per_device_batch_size',
    'val_batch_size'), 'eval.batch_size', 'It is global: over all devices'),
  (('eval_tasks', 'benchmarks', 'eval_task'), 'eval.tasks', "'name=kind:path', see docs/config.md"),
  (('sample_prompts', 'eval_prompts'), 'eval.prompts', ''),
  (('logging_steps', 'log_period', 'log_every_n_steps', 'log_interval', 'log_every',
    'logging_strategy', 'log_steps'), 'log.every', ''),
  (('report_to', 'logger', 'wandb', 'use_wandb', 'wandb_project', 'log_with', 'tracker', 'mlflow'),
   'log.sinks', "A tuple such as ('wandb',); metrics.jsonl and TensorBoard are always written"),
  (('push_to_hub', 'hub_model_id', 'hub_token', 'hf_access_token'),
   None, 'nothing is uploaded: WORKDIR/export is a Hugging Face folder'),
  (('profiler', 'profiler_steps', 'skip_first_n_steps_for_profiler', 'profile_steps'),
   'profile.start', 'A trace runs to profile.stop'),
  (('max_nonfinite_steps', 'skip_nan', 'abort_on_nan_loss'), 'max_bad_steps', ''),
  (('jax_cache_dir', 'compilation_cache_dir'), 'compile_cache', 'The cache lies in the workdir'),
  (('xla_flags', 'libtpu_init_args', 'compile_xla_flags'),
   'compiler_options', '(name, value) pairs, see docs/config.md'),
  # Adapters.
  (('lora_r', 'lora_rank', 'lora.r', 'use_peft', 'use_lora', 'adapter', 'qlora'), 'lora.rank',
   '0 trains the model itself'),
  (('lora_alpha',), 'lora.alpha', 'The update is scaled by alpha / rank'),
  (('lora_dropout',), 'lora.dropout', ''),
  (('attention_dropout', 'attention_probs_dropout_prob', 'attn_pdrop', 'attn_dropout'),
   'model.dropout.attention', ''),
  (('hidden_dropout', 'hidden_dropout_prob', 'resid_pdrop', 'residual_dropout', 'dropout_rate'),
   'model.dropout.residual', 'That of the embeddings is model.dropout.embedding'),
  (('embd_pdrop', 'embedding_dropout', 'embed_dropout'), 'model.dropout.embedding', ''),
  (('classifier_dropout', 'cls_dropout', 'seq_classif_dropout'), 'model.dropout.classifier', ''),
  (('disable_dropout',), 'model.dropout.residual', 'Decoders have none unless a rate is set'),
  (('lora_target', 'lora_target_modules', 'lora_target_linear', 'lora_modules', 'target_modules',
    'lora_module_path'),
   'lora.targets', "A regex over whole names such as layer0/attn/q, or 'all-linear'"),
  (('use_rslora', 'use_rs_lora'), 'lora.rslora', ''),
  (('use_dora', 'peft_use_dora'), 'lora.dora', ''),
  (('init_lora_weights', 'pissa_init'), 'lora.init', "'uniform' or 'pissa'"),
  (('loraplus_lr_ratio', 'loraplus_lr_embedding'), 'lora.b_lr_ratio', ''),
  (('modules_to_save', 'additional_target', 'lora_modules_to_save'), 'lora.train',
   'A regex over whole names such as embed/w'),
  (('peft_config',), None, _LORA),
)  # fmt: skip

_SECTIONS = {'peft': _LORA, 'qlora': _LORA, 'quantization': _BASE}
_PREFIXES = {
  'lora_': _LORA,
  'bnb_': _BASE,
  'dcn_': _AXES,
  'ici_': _AXES,
  'vllm_': 'rollouts are sampled on the devices of the run: leave it out',
}


def _plain_name(key: str) -> str:
  """Returns a name in the form of ROWS: lower case, with underscores."""
  key = re.sub(r'(?<=[a-z0-9])(?=[A-Z][a-z])', '_', key)  # numTrainEpochs
  return key.lower().replace('-', '_')


BY_NAME = {name: (key, note) for names, key, note in ROWS for name in names}


def find(key: str) -> str:
  """Returns the end of a message with the key to write instead of `key`; '' where no row has it."""
  name = _plain_name(key)
  last = name.rpartition('.')[2]
  found = BY_NAME.get(name) or BY_NAME.get(last)
  if not found:
    notes = [note for prefix, note in _PREFIXES.items() if last.startswith(prefix)]
    notes += [_SECTIONS[s] for s in [name.partition('.')[0]] if s in _SECTIONS]
    if not notes:
      return ''
    found = (None, notes[0])
  target, note = found
  if target is None:
    return f'; {note}'
  return f'; did you mean {target}?' + (f' {note}' if note else '')
