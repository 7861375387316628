"""The auxiliary models of a run."""

BESIDE = ('reference', 'value')


def model_of(params: dict) -> dict:
  """Returns the parameters of the trained model, without those of auxiliary models."""
  return {k: v for k, v in params.items() if k not in BESIDE}
