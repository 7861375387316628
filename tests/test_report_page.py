"""report.html in a browser: no console message, no request, readable, every control works.

Skipped where no Chromium is installed (Debian: apt-get install chromium).
"""

import itertools
import pathlib

import chromium
import pytest
import report_summaries
from report_summaries import summary, workdir

from ftjax.reporting import comparison, page

pytestmark = pytest.mark.skipif(
  chromium.find() is None,
  reason=f'no browser: none of {", ".join(chromium.NAMES)} is on PATH',
)

SIZES = ((1280, 800), (390, 844), (320, 640))
OPEN_ALL = "document.querySelectorAll('details').forEach((d) => { d.open = true; })"

# Texts whose contrast is below 4.5, from computed styles: WCAG 2.2, success criterion 1.4.3.
FAINT = """
(() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = numbers(color).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor, parts = numbers(color);
      if (parts.length < 4 || parts[3] === 1) return color;
      if (parts[3] !== 0) throw new Error('half transparent: ' + color);
    }
    throw new Error('no background');
  };
  const found = [], seen = { texts: 0, lowest: 99 };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    if (['SCRIPT', 'STYLE', 'title', 'desc'].includes(element.tagName)) continue;
    const color = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(color), light(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    seen.texts += 1;
    seen.lowest = Math.min(seen.lowest, ratio);
    if (ratio < 4.5 || style.opacity !== '1') {
      found.push([ratio, color, behind(element), element.className, walker.currentNode.data]);
    }
  }
  return { ...seen, found };
})()
"""


@pytest.fixture(scope='module')
def browser():
  with chromium.Browser() as found:
    yield found


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  folder = workdir(tmp_path_factory.mktemp('run'), summary(gate=report_summaries.GATE))
  (pathlib.Path(folder) / 'samples.jsonl').write_text(
    '{"step": 0, "prompt": "p", "answer": "a"}\n{"step": 9, "prompt": "p", "answer": "b"}\n'
  )
  return page.write(folder, is_running=True)


def quiet(browser, path):
  """Nothing was written to the console, and nothing but the file was asked for."""
  assert browser.problems() == [] and browser.requests() == [f'file://{path}']


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize(('width', 'height'), SIZES)
def test_the_page_fits_and_can_be_read(browser, path, width, height, scheme):
  browser.open(path, width, height, scheme)
  browser.ask(OPEN_ALL)
  assert browser.ask('document.documentElement.scrollWidth') <= width
  found = browser.ask(FAINT)
  assert found['texts'] > 300 and found['found'] == [] and found['lowest'] < 21
  background = browser.ask('getComputedStyle(document.body).backgroundColor')
  assert background == {'light': 'rgb(255, 255, 255)', 'dark': 'rgb(15, 20, 25)'}[scheme]
  quiet(browser, path)


def test_tables_scroll_inside_the_page_and_by_keyboard(browser, path):
  browser.open(path, 320, 640)
  browser.ask(OPEN_ALL)
  wide = browser.ask("""[...document.querySelectorAll('.scroll, pre')]
    .filter((e) => e.scrollWidth > e.clientWidth)
    .map((e) => [e.tabIndex, getComputedStyle(e).overflowX, !!e.getAttribute('aria-label')])""")
  assert len(wide) > 3 and all(w == [0, 'auto', True] for w in wide)


def test_the_contrast_check_sees_faint_text(browser, path):
  browser.open(path)
  browser.ask("document.querySelector('h1').style.color = '#999'")
  assert len(browser.ask(FAINT)['found']) == 1


def test_colors_follow_the_button(browser, path):
  browser.open(path, scheme='dark')
  color = 'getComputedStyle(document.body).backgroundColor'
  button = "document.getElementById('theme')"
  seen = []
  for _ in range(3):
    seen.append((browser.ask(color), browser.ask(f'{button}.textContent')))
    browser.ask(f'{button}.click()')
  dark, light = ('rgb(15, 20, 25)', 'Light colors'), ('rgb(255, 255, 255)', 'Dark colors')
  assert seen == [dark, light, dark]
  assert browser.ask(FAINT)['found'] == []
  quiet(browser, path)


def test_the_keyboard_reaches_every_control_with_a_visible_focus(browser, path):
  browser.open(path)
  browser.press('Tab')
  assert browser.ask('document.activeElement.textContent') == 'Skip to the verdict'
  assert browser.ask('document.activeElement.getBoundingClientRect().left') >= 0
  seen, wanted = (
    set(),
    browser.ask("""[...document.querySelectorAll(
    'a, button, select, input, summary, svg[tabindex], .scroll')]
    .filter((e) => e.checkVisibility() && !e.disabled)
    .map((e, i) => { e.dataset.number = i; return i; })"""),
  )
  for _ in range(len(wanted) + 20):
    number, outline = browser.ask("""[document.activeElement.dataset.number,
      getComputedStyle(document.activeElement).outlineStyle]""")
    if number is not None:
      assert outline != 'none'
      seen.add(int(number))
    browser.press('Tab')
  assert seen == set(wanted)


def test_charts_change_their_axis_and_show_values(browser, path):
  browser.open(path)
  plot = "[...document.querySelectorAll('.plot')].find((p) => p.querySelector('button.log'))"
  shown = f"""(() => {{ const p = {plot}; return [p.querySelector('.lin').hidden,
    p.querySelector('.lg').hidden, p.querySelector('.log').getAttribute('aria-pressed')]; }})()"""
  assert browser.ask(shown) == [False, True, 'false']
  browser.ask(f"{plot}.querySelector('.log').click()")
  assert browser.ask(shown) == [True, False, 'true']
  browser.ask(f"{plot}.querySelector('.log').click()")
  assert browser.ask(shown) == [False, True, 'false']
  svg = "document.querySelector('svg[data-scale]')"
  readout = f"{svg}.closest('.plot').querySelector('.readout').textContent"
  browser.ask(f'{svg}.focus()')
  browser.press('ArrowRight')
  assert browser.ask(readout).startswith('step 1: train ')
  loss = float(browser.ask(readout).split('train ')[1].split(',')[0])
  assert loss == pytest.approx(next(report_summaries.log_rows(120))['loss'], abs=0.02)
  for _ in range(5):
    browser.press('ArrowRight')
  assert 'step 6: train' in browser.ask(readout) and 'eval' in browser.ask(readout)
  browser.press('ArrowLeft')
  assert 'step 5: ' in browser.ask(readout)
  browser.ask(f'{svg}.scrollIntoView({{block: "center"}})')
  box = browser.ask(f'(() => {{ const b = {svg}.getBoundingClientRect(); '
                    'return [b.right - 14, b.top + b.height / 2]; })()')  # fmt: skip
  browser.call('Input.dispatchMouseEvent', type='mouseMoved', x=box[0], y=box[1])
  step = int(browser.ask(readout).split(':')[0].removeprefix('step '))
  assert 110 < step <= 120
  browser.call('Input.dispatchMouseEvent', type='mouseMoved', x=2, y=2)
  assert browser.ask(readout) == ''
  quiet(browser, path)


def test_examples_are_ordered_filtered_searched_and_continued(browser, path):
  browser.open(path)
  block = "document.querySelector('details.examples')"
  visible = f"""[...{block}.querySelectorAll('.card')].filter((c) => !c.hidden)
    .map((c) => [Number(c.dataset.place), Number(c.dataset.gain)])"""
  count = f"{block}.querySelector('.shown').textContent"

  def choose(name, value, event='change'):
    browser.ask(f"""(() => {{ const e = {block}.querySelector('.{name}');
      e.value = {value!r}; e.dispatchEvent(new Event('{event}')); }})()""")

  assert [p for p, _ in browser.ask(visible)] == list(range(10))
  assert browser.ask(count) == '10 of 60 shown'
  for step in (30, 50, 60):
    browser.ask(f"{block}.querySelector('.next').click()")
    assert len(browser.ask(visible)) == step
  assert browser.ask(f"{block}.querySelector('.next').hidden")
  choose('order', 'up')
  assert {g for _, g in browser.ask(visible)} == {1.0}
  choose('order', 'down')
  assert {g for _, g in browser.ask(visible)[:8]} == {-1.0}
  choose('state', 'worse')
  assert len(browser.ask(visible)) == 8  # of 60: each fifth, but not each fifteenth
  choose('order', 'place')
  places = [p for p, _ in browser.ask(visible)]
  assert places == [i for i in range(60) if i % 5 == 0 and i % 3]
  choose('state', '')
  choose('search', 'FILM 17 ', 'input')
  assert [p for p, _ in browser.ask(visible)] == [17] and browser.ask(count) == '1 of 1 shown'
  choose('search', 'no such text', 'input')
  assert browser.ask(visible) == [] and browser.ask(count) == '0 of 0 shown'
  choose('search', '', 'input')
  mark = "getComputedStyle(document.querySelector('mark.new')).textDecorationLine"
  assert browser.ask(mark) == 'underline'
  browser.ask("document.getElementById('marks').click()")
  assert browser.ask(mark) == 'none'
  assert browser.ask("document.querySelector('mark.new').textContent") == 'positive'
  quiet(browser, path)


def test_every_fold_opens_and_every_link_has_a_target(browser, path):
  browser.open(path)
  folds = browser.ask("""[...document.querySelectorAll('summary')].map((s) => {
    const before = s.parentElement.open; s.click(); return s.parentElement.open !== before; })""")
  assert len(folds) > 10 and all(folds)
  links = browser.ask("""[...document.querySelectorAll('a')].map(
    (a) => !!document.getElementById(a.getAttribute('href').slice(1)))""")
  assert len(links) > 8 and all(links)
  quiet(browser, path)


def test_a_screen_reader_finds_names(browser, path):
  browser.open(path)
  browser.call('Accessibility.enable')
  browser.ask(OPEN_ALL)
  nodes = browser.call('Accessibility.getFullAXTree')['nodes']
  nodes = [n for n in nodes if not n['ignored']]
  roles = {}
  for node in nodes:
    name = node.get('name', {}).get('value', '')
    roles.setdefault(node['role']['value'], []).append(name)
  for role in ('button', 'combobox', 'searchbox', 'checkbox', 'link', 'region', 'image'):
    assert roles[role] and all(n.strip() for n in roles[role]), role
  assert any('loss. train: first' in n for n in roles['image'])
  headings = browser.ask("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => +h.tagName[1])")
  assert headings[0] == 1 and headings.count(1) == 1
  assert all(b - a <= 1 for a, b in itertools.pairwise(headings))


def test_paper_has_light_colors_and_no_controls(browser, path):
  browser.open(path, scheme='dark', media='print')
  assert browser.ask('getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)'
  assert not browser.ask("document.querySelector('nav').getClientRects().length")
  assert not browser.ask("document.querySelector('#theme').getClientRects().length")
  assert browser.ask(FAINT)['found'] == []
  assert browser.pdf().startswith(b'%PDF')
  assert browser.ask("document.querySelectorAll('#tasks details[open]').length") == 0  # as before


def test_hostile_texts_run_nothing_and_stay_in_their_place(browser, tmp_path):
  path = page.write(workdir(tmp_path, report_summaries.hostile()))
  for width, height in SIZES[:2]:
    browser.open(path, width, height)
    browser.ask(OPEN_ALL)
    assert browser.ask('document.documentElement.scrollWidth') <= width
    assert browser.ask("document.querySelectorAll('img, script:not(:last-child)').length") == 0
    quiet(browser, path)
  browser.ask(
    "document.body.insertAdjacentHTML('beforeend', '<p onclick=\"document.title=1\">x</p>')"
  )
  browser.ask('document.body.lastElementChild.click()')
  assert browser.ask('document.title') != '1'  # the policy refuses what is not the page's own


def test_pages_of_almost_nothing_and_of_several_runs(browser, tmp_path):
  empty = page.write(str(tmp_path))
  paths = [workdir(tmp_path / name) for name in ('one', 'two', 'three')]
  names = [pathlib.Path(p).name for p in paths]
  found = comparison.compare(paths, summary(report_summaries.task(models=names), models=names))
  several = tmp_path / 'comparison.html'
  several.write_text(found.page, encoding='utf-8')
  for path in (empty, str(several)):
    for width, height in SIZES:
      browser.open(path, width, height, 'dark')
      browser.ask(OPEN_ALL)
      assert browser.ask('document.documentElement.scrollWidth') <= width
      assert browser.ask(FAINT)['found'] == []
      quiet(browser, path)
