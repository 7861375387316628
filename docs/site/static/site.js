// Where pages are opened as files, a browser does not let the search read them for excerpts.
if (location.protocol === 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
