"""Settings of Sphinx for the documentation; docs/site/build.py runs it."""

import os
import pathlib

_HERE = pathlib.Path(__file__).resolve().parent

project = 'ftjax'
author = 'the authors of ftjax'
# build.py sets these two.
release = version = os.environ['FTJAX_DOCS_VERSION']
html_context = {'commit': os.environ['FTJAX_DOCS_COMMIT']}

extensions = ['myst_parser']
root_doc = 'index'
source_suffix = {'.md': 'markdown'}
nitpicky = True
myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings = ['misc.highlighting_failure']  # examples with "…" are not quite their language
highlight_language = 'text'
smartquotes = False  # quotes stay as they are typed

templates_path = [str(_HERE / 'templates')]
html_theme = 'furo'
html_title = f'ftjax {version}'
html_static_path = [str(_HERE / 'static')]
html_css_files = ['site.css']
html_js_files = ['site.js']
html_copy_source = False
html_use_index = False
html_show_sphinx = False
html_theme_options = {'top_of_page_buttons': []}
pygments_style, pygments_dark_style = 'tango', 'monokai'
