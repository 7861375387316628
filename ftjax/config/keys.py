"""Every config key once, with its default, unit and meaning, section by section; those of the
optimizer and of the loss of tokens are in optim_keys.py, those of labels in label_keys.py.

A config file is Python: `from ftjax import config; def get_config(): c = config.default(); c.steps
= 100; return c`. Keys are locked, so a misspelt one is an error. Code reads `c.key`; there is no
second default anywhere. layers.toml lists the folders that read this object."""

from ml_collections import config_dict

from ftjax.config import label_keys, optim_keys
from ftjax.config.section import Section


def default() -> Section:
  """Returns the config that every experiment starts from."""
  c = Section()
  _add_run(c)
  _add_model(c)
  _add_data(c)
  _add_lora(c)
  optim_keys.add_optim(c)
  optim_keys.add_loss(c)
  _add_moe(c)
  _add_distill(c)
  _add_seq2seq(c)
  _add_dpo(c)
  _add_reward_model(c)
  label_keys.add_labels(c)
  _add_rollout(c)
  _add_policy(c)
  _add_grpo(c)
  _add_ppo(c)
  _add_best_of_n(c)
  _add_custom(c)
  _add_mesh(c)
  _add_checkpoint(c)
  _add_eval(c)
  _add_gate(c)
  _add_log(c)
  _add_profile(c)
  _add_watchdog(c)
  _add_limits(c)
  _add_study(c)
  return c.lock()


def _add_run(c: Section) -> None:
  c.algorithm = 'sft'  # what is trained, and on what kind of rows
  c.seed = 0  # seed of data order, noise and random initialization
  c.steps = 0  # optimizer updates; 0: follow epochs. Where both are set, steps counts
  c.epochs = 1.0  # passes over the training data, when steps is 0
  # Step after which this start ends, evaluated and saved, without an export; a later start resumes
  # there. 0: at the last step. Schedules follow steps.
  c.stop_at = 0
  # Global, per optimizer update over all devices and micro-batches: packed sequences for sft, pairs
  # for preferences, prompts for rollouts.
  c.batch_size = 16
  c.seq_len = 1024  # tokens of a packed sequence; the two sides of a pair share one
  # Micro-batches that batch_size is divided into: less memory, the same loss. It does not multiply
  # batch_size.
  c.grad_accum = 1
  c.init_from = ''  # a workdir: start from its weights, with fresh optimizer and data
  # What the backward pass recomputes to save memory: nothing, all but matrix products, everything.
  c.remat = 'dots'


def _add_model(c: Section) -> None:
  c.model = Section()
  c.model.path = ''  # Hugging Face folder, GGUF file, or org/name[@revision] on the hub
  c.model.family = ''  # package.module:FAMILY, a model family of your own; '': by its model_type
  c.model.param_dtype = 'float32'  # dtype of master parameters
  c.model.compute_dtype = 'float32'  # dtype of activations and matrix products
  # Texts that become one new token each, of the text that is read and written. Their rows start as
  # the mean of all rows.
  c.model.add_tokens = ()
  c.model.add_special_tokens = ()  # the same for special tokens, which decoded text leaves out
  # (new token, text) pairs: its rows start as the mean of the rows of the text's tokens instead.
  c.model.init_tokens = ()
  # Rows of the vocabulary's tables are padded to a multiple of this in memory, so that mesh.tensor
  # divides them; results and exports are those without padding.
  c.model.vocab_multiple = 1
  # Shares of numbers that a training step drops; -1: that of an encoder's config.json, none in a
  # decoder. Not in rollouts.
  c.model.dropout = Section()
  c.model.dropout.attention = -1.0  # of the probabilities of softmax attention
  c.model.dropout.residual = -1.0  # of the output of a layer's attention, and of its MLP
  c.model.dropout.embedding = -1.0  # of the embeddings
  c.model.dropout.classifier = -1.0  # of what the last map of a label head reads
  # Instead of a path, a small model with random weights and a byte tokenizer: a dict in the keys of
  # a Hugging Face config.json.
  c.model.random = Section()


def _add_data(c: Section) -> None:
  c.data = Section()
  # Training data, path[::format][@weight], comma-separated or a tuple; a weight is a share of rows.
  c.data.train = config_dict.FieldReference('', field_type=object)
  # Evaluation data in the same form, without weights; '' with eval_fraction > 0: split off the
  # training data.
  c.data.eval = config_dict.FieldReference('', field_type=object)
  c.data.eval_fraction = 0.0  # share of training rows, chosen by hash, held out for evaluation
  # Several examples in one sequence, without influence on each other; False: one each, padded.
  c.data.packing = True
  # What happens to examples of more than seq_len tokens; truncate_left keeps BOS, and the system
  # turn where it takes at most half of seq_len.
  c.data.on_overlength = 'error'
  # Content of a row that the chat template does not render: an error, or a warning with its count.
  c.data.on_unrendered = 'error'
  # Rows that cannot be read or encoded: an error, or left out (drop), counted and listed.
  c.data.on_bad_row = 'error'
  # Weights of examples by how frequent their answer is, for classification: none, by its square
  # root, or so that all labels count the same (equal).
  c.data.balance = 'none'
  # Order of the rows of each epoch: random, the short ones first (length), or those of a small
  # `difficulty` first.
  c.data.curriculum = 'none'
  # Shares of several sources without @weight: their rows to the power 1 / mix_temperature; 1: as
  # many as they have, larger: nearer to equal shares.
  c.data.mix_temperature = 1.0
  # Altered copies of training rows: word_dropout@RATE, swap@RATE, noise@RATE, template; see
  # docs/augmentation.md.
  c.data.augment = ()
  c.data.augment_copies = 1  # altered copies of each row beside it
  c.data.augment_templates = ()  # texts with {prompt}, of which `template` draws one
  # Tokens that are supervised: every turn of the assistant, its last turn (completion), all tokens.
  c.data.loss_on = 'assistant'
  c.data.chat_template = ''  # file with a jinja template in place of the model's; exported with it
  c.data.cache = ''  # folder for tokenized data; '': data_cache in the workdir
  # Rows of data.train whose faults are counted in the log and in the report at the start; 0: none.
  # python -m ftjax.preview --audit looks at all of them, and for more.
  c.data.audit = 2000
  # Whether errors that this audit finds (conflicting labels, secrets, empty answers) end the run.
  c.data.on_audit = 'report'
  c.data.workers = 0  # processes that tokenize, on each host; 0: one for each core


def _add_lora(c: Section) -> None:
  # Low-rank adapters on a frozen base. Names of linear maps: layer0/attn/q, layer0/mlp/down.
  c.lora = Section()
  c.lora.rank = 0  # rank of the adapters; 0: none, the model itself is trained
  c.lora.alpha = 32.0  # the update is scaled by alpha / rank
  # Linear maps that have one: those of the blocks (all-linear), or a regex over whole names; the
  # head's name is `head`.
  c.lora.targets = 'all-linear'
  c.lora.rank_pattern = ()  # (regex, rank) pairs for maps of another rank; the first match counts
  c.lora.alpha_pattern = ()  # (regex, alpha) pairs, in the same way
  c.lora.rslora = False  # scale by alpha / sqrt(rank)
  c.lora.dora = False  # train the length of each output's weights apart from their direction
  # Initial values: uniform (B is 0), or the principal components of the base (pissa).
  c.lora.init = 'uniform'
  c.lora.dropout = 0.0  # share of an adapter's inputs that a training step drops
  c.lora.b_lr_ratio = 1.0  # learning rate of B relative to that of A; 16 is usual for LoRA+
  c.lora.train = ''  # regex over parameters that are trained whole, such as 'embed/w|head/w'
  # How the frozen base is held: float32, bfloat16, int8 (one scale for each output), nf4 (QLoRA).
  c.lora.base = 'bfloat16'
  c.lora.block = 64  # weights that share a scale in nf4: a power of two that divides their inputs
  # Where init_from is an adapter run: continue its adapter, or merge it and begin a new one.
  c.lora.on_init_from = 'continue'
  c.lora.merge = True  # write the merged model to merged/ of the workdir at the end
  c.lora.merge_kl = (
    1e-3  # largest KL from adapter to merged model that merged/ may have, nats/token
  )


def _add_moe(c: Section) -> None:
  c.moe = Section()
  # Factor of the load-balance loss of a model with experts; 0: none, -1: that of its config.json.
  c.moe.balance = -1.0


def _add_distill(c: Section) -> None:
  c.distill = Section()
  # Folder or hub id of the teacher, a model with the same tokenizer; '': the model that training
  # starts from.
  c.distill.teacher = ''
  # Folder that ftjax.teacher writes: the teacher's likeliest tokens of each position of data.train,
  # read in place of a teacher; '': the teacher is computed in each step.
  c.distill.file = ''
  c.distill.top_k = 64  # tokens of each position in that folder
  # Share of the steps that train on completions of the student in place of the rows' answers (GKD),
  # sampled by the keys of rollout.
  c.distill.on_policy = 0.0
  c.distill.divergence = 'forward_kl'  # forward_kl: KL(teacher || student); js: with beta
  c.distill.beta = 0.5  # weight of the teacher in the mixture of js
  c.distill.temperature = 1.0  # of both distributions
  c.distill.share = 0.5  # of the divergence in the loss; the rest is the likelihood of the token


def _add_seq2seq(c: Section) -> None:
  c.seq2seq = Section()
  # Tokens of a packed sequence that an encoder reads; 0: as many as its decoder, seq_len.
  c.seq2seq.source_len = 0
  c.span_corruption = Section()
  c.span_corruption.density = 0.15  # share of the tokens of a document that are noise
  c.span_corruption.mean_length = 3.0  # tokens of a span of noise, on average


def _add_dpo(c: Section) -> None:
  c.dpo = Section()
  c.dpo.loss = 'sigmoid'  # sigmoid is DPO's; the others are described in docs/preference.md
  c.dpo.beta = 0.1  # strength of the pull to the reference
  # f-divergence from the reference of losses of a difference of log-ratios.
  c.dpo.divergence = 'reverse_kl'
  c.dpo.divergence_alpha = 0.5  # order of the divergence alpha; 1 is reverse_kl, 0 forward_kl
  # Where the reference's log-probs come from: computed in each step, or once before the first one.
  c.dpo.reference = 'step'
  c.dpo.label_smoothing = 0.0  # assumed share of flipped labels, in [0, 0.5)
  c.dpo.tau = 0.05  # temperature of the blend in discopop
  c.dpo.gamma = 0.0  # margin of simpo, in rewards
  c.dpo.nll_coef = 0.0  # weight of the chosen completion's likelihood in cpo and simpo
  c.dpo.desirable = 1.0  # weight of desirable completions in kto
  c.dpo.undesirable = 1.0  # weight of undesirable completions in kto


def _add_reward_model(c: Section) -> None:
  c.reward_model = Section()
  c.reward_model.objective = 'pairs'  # pairs: Bradley-Terry; scores: squared error
  c.reward_model.centring = 0.0  # weight of (sum of a pair's rewards)^2; 0.01 is usual


def _add_rollout(c: Section) -> None:
  # For algorithms that train on completions of the model.
  c.rollout = Section()
  c.rollout.group = 8  # completions of each prompt
  c.rollout.max_tokens = 256  # most tokens of a completion
  c.rollout.temperature = 1.0  # of sampling, and of the log-probs that are trained
  c.rollout.top_k = 0  # sample among the k likeliest tokens; 0: all
  c.rollout.top_p = 1.0  # sample among the likeliest tokens of this probability in all; 1: all
  c.rollout.slots = 64  # sequences decoded at once
  c.rollout.stop = ()  # texts that end a completion
  # (name, weight) pairs, or one text like 'math@1,format:think,answer@0.2': docs/rewards.md.
  c.rollout.rewards = config_dict.FieldReference((), field_type=object)
  # Folder of the reward `model` (export/ of a run with algorithm=reward_model); '': none.
  c.rollout.reward_model = ''
  # Where that model is one of steps (algorithm=prm): min, product or last of its steps' scores.
  c.rollout.step_reward = ''
  c.rollout.step_separator = '\n'  # text after each step, prm.separator of that model's training
  c.rollout.reward_limit = 1.0  # seconds for one completion in a built-in reward that may hang
  c.rollout.function_limit = 60.0  # seconds for one call of a user's reward function
  c.rollout.max_failed = 3  # rollouts in a row without one reward that end the run; 0: never
  # Times that prompts with a zero-variance group are replaced by others (DAPO's dynamic sampling);
  # so many batches of prompts are reserved for each rollout.
  c.rollout.redraws = 0
  c.rollout.updates = 1  # passes over a rollout
  c.rollout.minibatches = 1  # optimizer updates in each pass
  c.rollout.samples = 8  # completions of a rollout that are kept in rollouts/<number>.jsonl


def _add_policy(c: Section) -> None:
  # The policy-gradient loss.
  c.policy = Section()
  c.policy.surrogate = 'clip'  # form of the loss; clip is PPO's
  c.policy.level = 'token'  # what a ratio is taken over: token, sequence (GSPO), trajectory
  c.policy.clip_low = 0.2  # the ratio stays above 1 - clip_low
  c.policy.clip_high = 0.2  # the ratio stays below 1 + clip_high
  c.policy.dual_clip = 0.0  # largest ratio with a negative advantage; 0: none
  # Mean over all tokens, over the means of the completions (sequence), or by a constant length.
  c.policy.aggregate = 'token'
  # Divergence from the initial model: a loss term k2, k3 or k3_is; reward: k1, subtracted from the
  # reward.
  c.policy.kl = 'k3_is'
  c.policy.kl_coef = 0.0  # weight of that divergence; 0: no copy of the initial model is held
  # Nats per token that the weight is adapted to, once a rollout; 0: the weight is fixed.
  c.policy.kl_target = 0.0
  c.policy.kl_gain = 0.1  # speed of that adaptation; a change is at most a fifth of it
  c.policy.entropy_coef = 0.0  # weight of the entropy bonus
  # Importance weights for a sampler whose log-probs differ from the trainer's.
  c.policy.correction = 'none'
  c.policy.correction_low = 0.0  # lower bound of that weight
  c.policy.correction_high = 2.0  # upper bound of that weight
  c.policy.overlong = 0  # last tokens before max_tokens with a penalty, up to 1; 0: none


def _add_grpo(c: Section) -> None:
  c.grpo = Section()
  # How advantages are computed: all but reinforce_pp are relative to the prompt's group.
  c.grpo.advantage = 'grpo'


def _add_ppo(c: Section) -> None:
  c.ppo = Section()
  # Reward model that the value model starts from, an export folder; '': the policy, with value 0.
  c.ppo.value_from = ''
  c.ppo.gamma = 1.0  # discount per token
  c.ppo.lam = 0.95  # lambda of generalized advantage estimation
  c.ppo.whiten = True  # advantages of a rollout are scaled to mean 0 and variance 1
  c.ppo.value_coef = 0.1  # weight of the value loss
  c.ppo.value_clip = 0.2  # largest change of a value on one rollout; 0: no limit


def _add_best_of_n(c: Section) -> None:
  c.best_of_n = Section()
  c.best_of_n.keep = 1  # completions of each prompt that are trained on, the best ones
  c.best_of_n.min_reward = -1e9  # completions with a smaller reward are left out


def _add_custom(c: Section) -> None:
  # The keys of an algorithm outside of ftjax (algorithm='module:RECORD'), which its record lists
  # with their defaults.
  c.custom = Section()


def _add_mesh(c: Section) -> None:
  # Devices along each axis; one may be -1, for all devices that the others leave.
  c.mesh = Section()
  c.mesh.data = 1  # copies of the parameters, each with its share of the batch
  c.mesh.fsdp = -1  # parameters, optimizer and batch sharded
  c.mesh.context = 1  # each sequence split
  c.mesh.tensor = 1  # each matrix split
  c.mesh.expert = 1  # experts of a mixture spread


def _add_checkpoint(c: Section) -> None:
  c.checkpoint = Section()
  c.checkpoint.every = 100  # steps between checkpoints; the last step is always saved; 0: only that
  c.checkpoint.keep = 2  # number of latest checkpoints that are kept, beside the best one
  c.checkpoint.best_metric = ''  # such as eval/loss: its best checkpoint is kept and exported
  c.checkpoint.best_mode = 'min'  # whether a smaller or a larger best_metric is better
  c.checkpoint.patience = 0  # evaluations without a better best_metric that end training; 0: never


def _add_eval(c: Section) -> None:
  c.eval = Section()
  c.eval.every = 0  # steps between evaluations of the loss; the last step is always evaluated
  c.eval.batch_size = 16  # sequences of an evaluation batch, over all devices
  # 'name=kind:path': base and tuned are compared on these at the end; docs/evaluation.md has the
  # kinds. A kind of your own is name=module:object:path.
  c.eval.tasks = ()
  # Whether a fixed set of texts, requests and questions from outside the task is run too: what the
  # tuning cost. Base and tuned model are in memory at once for it.
  c.eval.general = False
  c.eval.rows = 0  # rows of each task that are run, chosen by hash; 0: all
  c.eval.lm_eval_path = ''  # folder of YAML tasks of your own for entries lm_eval:TASK; '': none
  c.eval.prompts = ()  # texts that are completed greedily at every evaluation
  c.eval.max_tokens = 64  # most tokens of a completion, of eval.prompts and of tasks
  c.eval.stop = ()  # texts that end a completion of a task; they are not part of it
  c.eval.samples = 1  # completions of each prompt of a task, for pass@k and maj@k
  c.eval.temperature = 0.0  # of these completions; 0: greedy
  c.eval.num_beams = 1  # completions that a beam search extends, of encoder-decoders; 1: none
  c.eval.length_penalty = 1.0  # beams: log-probability / tokens**length_penalty is compared
  # Examples before each prompt for another comparison: the base model with so many examples.
  c.eval.shots = 0
  # Where they come from: 'task=path', a source of rows of the task's form; other tasks take
  # training rows.
  c.eval.shots_from = ()
  # Further models on the same rows: 'endpoint:URL#name', an OpenAI-compatible server.
  c.eval.models = ()
  c.eval.endpoint = Section()
  c.eval.endpoint.concurrency = 8  # requests to a server at once
  c.eval.endpoint.timeout = 600.0  # seconds for one answer
  c.eval.in_loop = ()  # names of eval.tasks that are run at every evaluation, eval.every steps
  c.eval.in_loop_rows = 64  # rows of such a task that are run; the same at every evaluation
  # Share of the time of training that eval.in_loop may take; evaluations beyond it leave it out.
  # The last one never does.
  c.eval.max_share = 0.1
  # Whether rows of eval.tasks and of the evaluation split are looked up in the training data.
  c.eval.contamination = True


def _add_gate(c: Section) -> None:
  # Rules that the tuned model's figures must fulfil, or it is not exported (exit code 5):
  # 'TASK/METRIC >= base - 0.02', 'TASK/METRIC <= 0.05', 'TASK/METRIC > base significantly'.
  c.gate = ()


def _add_log(c: Section) -> None:
  c.log = Section()
  c.log.every = 1  # steps between logged metrics
  c.log.sinks = ()  # wandb, mlflow; metrics.jsonl and TensorBoard are always written


def _add_profile(c: Section) -> None:
  # A jax profiler trace; start = stop: none.
  c.profile = Section()
  c.profile.start = 0  # first step of the trace
  c.profile.stop = 0  # the step after its last one


def _add_watchdog(c: Section) -> None:
  # Seconds without progress after which all processes end with exit code 75, to be started again;
  # 0: never.
  c.watchdog = Section()
  c.watchdog.tokenize = 24 * 3600.0  # one data source
  c.watchdog.restore = 3600.0  # reading weights or a checkpoint, and phases without a limit
  c.watchdog.compile = 3600.0  # compiling the step
  c.watchdog.step = 600.0  # one update; ten times the median update, where that is longer
  c.watchdog.rollout = 3600.0  # the next tokens of a rollout, or its rewards
  c.watchdog.evaluate = 3600.0  # one evaluation batch
  c.watchdog.save = 1200.0  # saving a checkpoint
  c.watchdog.export = 7200.0  # writing the exported model


def _add_limits(c: Section) -> None:
  c.max_bad_steps = 3  # non-finite steps in a row that end the run with exit code 4
  # Compiled programs are kept in JAX_COMPILATION_CACHE_DIR, or else in the workdir.
  c.compile_cache = True
  # (name, value) pairs added to the table of runtime/compiler_options.py; '' removes one.
  c.compiler_options = ()


def _add_study(c: Section) -> None:
  # Many runs of one config: python -m ftjax.study; docs/studies.md. No other entry reads these.
  c.study = Section()
  # What the runs differ in: keys (grid, random, sobol, tpe, gp), folds of data.train (kfold), the
  # number of rows (learning_curve), the seed (seeds).
  c.study.kind = ''
  # Keys and their values: 'optim.lr=log:1e-5:1e-3', 'optim.b2=uniform:0.9:0.999',
  # 'lora.rank=8,16,32', 'lora.rank=int:4:64', 'batch_size=logint:8:64'.
  c.study.space = ()
  c.study.trials = 20  # points of the space that are tried; a grid tries all of its points
  # What is compared: TASK/METRIC of eval.tasks, or eval/loss and its like; '': the best_metric of
  # checkpoint, else the first figure of the first task, else eval/loss.
  c.study.metric = ''
  c.study.seed = 0  # seed of folds, subsets and the choice of points; runs have their own
  c.study.seeds = (0,)  # values of seed that each setting, or each number of rows, is run with
  # Steps at which the runs of a search are compared, and only the best continue; () for none.
  c.study.rungs = ()
  c.study.reduction = 3  # of so many runs one is promoted at each rung
  c.study.folds = 5  # parts of data.train, each of which is held out once
  c.study.repeats = 1  # times that the rows are dealt to folds anew
  # Field of the rows whose values each fold has in equal shares; '': `label`, or the answers of
  # rows for a task of choices; 'none': not stratified.
  c.study.stratify = ''
  c.study.group = 'group'  # field of the rows: those of one value are always in the same fold
  c.study.fractions = (0.05, 0.1, 0.3, 1.0)  # shares of the rows of data.train, nested
  # Command that runs one run, with {config_overrides} {workdir} and, if wanted, {name} {slot};
  # '': python -m ftjax.train on this machine.
  c.study.launch = ''
  c.study.parallel = 1  # runs at a time
