"""The config of an experiment. A config file needs `config.default()` alone."""

from ftjax.config.keys import default as default
