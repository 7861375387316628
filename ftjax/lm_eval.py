"""python -m ftjax.lm_eval run --model ftjax --model_args path=DIR_OR_WORKDIR --tasks TASK ...

The command line of EleutherAI's lm-eval with one model more, `ftjax`. All of its arguments are
lm-eval's own (--help lists them). --model_args: path (what --model of ftjax.generate takes), dtype
(float32 or bfloat16), base (of an adapter), family, max_length, add_bos_token, enable_thinking,
seed (of sampling)."""

from ftjax import cli


def main() -> None:
  """Registers the model and runs lm-eval's command line on sys.argv."""
  from ftjax.experiment import lm_eval_tasks

  lm_eval_tasks.need()
  from lm_eval.__main__ import cli_evaluate

  from ftjax.serving import lm_eval_registration

  lm_eval_registration.register()
  cli_evaluate()


if __name__ == '__main__':
  cli.run(main, has_flags=False)
