"""Config keys of the algorithms that give labels or vectors to texts, with their defaults."""

from ftjax.config.section import Section


def add_labels(c: Section) -> None:
  """Adds the sections of the algorithms that give labels or vectors."""
  c.classification = Section()
  # single: one label for a text; multi: any number of them; regression: a number, by squared error;
  # binary: a number from 0 to 1, by cross-entropy, as rerankers (cross-encoders) are trained.
  c.classification.objective = 'single'
  c.classification.labels = ()  # names in the order of their numbers; (): those of data.train
  c.classification.class_weights = ()  # factors of the loss, one for each label; (): all 1
  c.classification.focal_gamma = 0.0  # of focal loss; 0: cross-entropy
  c.classification.label_smoothing = 0.0  # share that goes to all labels alike
  c.classification.threshold = 0.5  # of multi: a label is predicted from this probability
  c.masked_lm = Section()
  c.masked_lm.share = 0.15  # of the tokens that a step predicts
  c.masked_lm.masked = 0.8  # share of these that the mask replaces
  c.masked_lm.random = 0.1  # share of these that a random token replaces; the rest stay
  c.masked_lm.mask_id = -1  # id of the mask; -1: that of the tokenizer
  c.token_classification = Section()
  # Names in the order of their numbers, such as ('O', 'B-PER', 'I-PER'); (): those of data.train.
  c.token_classification.labels = ()
  # Whether all sub-words of a word have its label, and not the first alone.
  c.token_classification.all_subwords = False
  c.embedding = Section()
  # contrastive: cross-entropy of the positive among all candidates (InfoNCE, multiple negatives
  # ranking); margin: the positive is nearer than the nearest negative by a margin; cosine: squared
  # error of the cosine of two texts with a score.
  c.embedding.objective = 'contrastive'
  # What one vector of a text is made of: the mean of its tokens, the first or the last one. '': as
  # the model's 1_Pooling/config.json has it, else mean for encoders and last for decoders.
  c.embedding.pool = ''
  c.embedding.temperature = 0.05  # of contrastive: cosines are divided by it
  c.embedding.symmetric = False  # contrastive: also the anchor among all anchors, half of the loss
  c.embedding.margin = 0.2  # of margin: a difference of cosines
  # Whether the texts of the other rows of a step are negatives too, and not those of the row alone.
  c.embedding.in_batch = True
  c.embedding.negatives = 1  # the most negatives that a row names
  c.prm = Section()
  c.prm.separator = '\n'  # text after each step of a solution, at whose end the step is scored
