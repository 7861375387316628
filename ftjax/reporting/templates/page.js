'use strict';
(() => {
  const root = document.documentElement;
  const all = (selector, where = document) => [...where.querySelectorAll(selector)];
  root.classList.add('js', 'marks');

  // Colors: those of the system until the button is pressed.
  const theme = document.getElementById('theme');
  const isDark = () => (root.dataset.theme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark';
  const named = () => {
    theme.textContent = isDark() ? 'Light colors' : 'Dark colors';
    theme.setAttribute('aria-pressed', String(isDark()));
  };
  theme.addEventListener('click', () => { root.dataset.theme = isDark() ? 'light' : 'dark'; named(); });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', named);
  named();

  // Charts: logarithmic axis, and values at the pointer or at an arrow key.
  for (const button of all('button.log')) {
    button.addEventListener('click', () => {
      const plot = button.closest('.plot');
      const isLog = button.getAttribute('aria-pressed') !== 'true';
      button.setAttribute('aria-pressed', String(isLog));
      plot.querySelector('.lin').hidden = isLog;
      plot.querySelector('.lg').hidden = !isLog;
    });
  }
  const shown = (value) => {
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };
  const curvesOf = (svg) => {
    const found = new Map();
    for (const curve of all('[data-name]', svg)) {
      const points = curve.tagName === 'circle'
        ? [[Number(curve.getAttribute('cx')), Number(curve.getAttribute('cy'))]]
        : curve.getAttribute('points').split(' ').map((p) => p.split(',').map(Number));
      if (!found.has(curve.dataset.name)) found.set(curve.dataset.name, points);
    }
    return found;
  };
  for (const svg of all('svg[data-scale]')) {
    const [x0, x1, y0, y1] = svg.dataset.scale.split(' ').map(Number);
    const [left, right, bottom, top] = svg.dataset.frame.split(' ').map(Number);
    const isLog = svg.dataset.log === '1';
    const readout = svg.closest('.plot').querySelector('.readout');
    let curves = null, line = null, at = null;
    const step = (x) => Math.round(x0 + (x - left) / (right - left) * (x1 - x0));
    const value = (y) => {
      const part = (bottom - y) / (bottom - top);
      return isLog ? y0 * (y1 / y0) ** part : y0 + part * (y1 - y0);
    };
    const show = (x) => {
      curves = curves || curvesOf(svg);
      let place = null;
      for (const points of curves.values()) {
        for (const [px] of points) if (place === null || Math.abs(px - x) < Math.abs(place - x)) place = px;
      }
      if (place === null) return;
      at = place;
      if (!line) {
        line = document.createElementNS('http://www.w3.org/2000/svg', 'line');
        line.setAttribute('class', 'cross');
        line.setAttribute('y1', top);
        line.setAttribute('y2', bottom);
        svg.append(line);
      }
      line.setAttribute('x1', at);
      line.setAttribute('x2', at);
      const texts = [];
      for (const [name, points] of curves) {
        const near = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
        if (Math.abs(near[0] - at) <= 4) texts.push(name + ' ' + shown(value(near[1])));
      }
      readout.textContent = 'step ' + step(at) + ': ' + texts.join(', ');
    };
    const hide = () => {
      if (line) line.remove();
      line = null;
      readout.textContent = '';
    };
    svg.addEventListener('pointermove', (event) => {
      const box = svg.getBoundingClientRect();
      show((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width);
    });
    svg.addEventListener('pointerleave', hide);
    svg.addEventListener('blur', hide);
    svg.addEventListener('keydown', (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!way) return;
      event.preventDefault();
      curves = curves || curvesOf(svg);
      const places = [...new Set([...curves.values()].flat().map((p) => p[0]))].sort((a, b) => a - b);
      const next = at === null ? places : places.filter((p) => (p - at) * way > 0.05);
      if (next.length) show(way > 0 ? next[0] : next[next.length - 1]);
    });
  }

  // Examples: order, filter, search; at first 10, then 20 more at a time.
  const PAGE = 10, MORE = 20;
  for (const block of all('details.examples')) {
    const cards = all('.card', block), list = block.querySelector('.cards');
    const [order, state, search] = ['.order', '.state', '.search'].map((s) => block.querySelector(s));
    const next = block.querySelector('.next'), count = block.querySelector('.shown');
    let most = PAGE, texts = null;
    const place = (card) => Number(card.dataset.place), gain = (card) => Number(card.dataset.gain);
    const orders = {
      place: (a, b) => place(a) - place(b),
      up: (a, b) => gain(b) - gain(a) || place(a) - place(b),
      down: (a, b) => gain(a) - gain(b) || place(a) - place(b),
    };
    const update = (isNewOrder) => {
      const words = search.value.trim().toLowerCase();
      if (words && !texts) texts = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
      if (isNewOrder) list.append(...cards.sort(orders[order.value]));
      let fit = 0;
      for (const card of cards) {
        const isIn = (!state.value || card.dataset.state === state.value) && (!words || texts.get(card).includes(words));
        fit += isIn;
        card.hidden = !isIn || fit > most;
      }
      next.hidden = fit <= most;
      count.textContent = Math.min(fit, most) + ' of ' + fit + ' shown';
    };
    order.addEventListener('change', () => { most = PAGE; update(true); });
    state.addEventListener('change', () => { most = PAGE; update(false); });
    search.addEventListener('input', () => { most = PAGE; update(false); });
    next.addEventListener('click', () => { most += MORE; update(false); });
    block.querySelector('form').addEventListener('submit', (event) => event.preventDefault());
    update(false);
  }
  const marks = document.getElementById('marks');
  if (marks) marks.addEventListener('change', () => root.classList.toggle('marks', marks.checked));

  // Paper has no folds.
  let closed = [];
  addEventListener('beforeprint', () => {
    closed = all('details:not([open]):not(.examples)');
    for (const fold of closed) fold.open = true;
  });
  addEventListener('afterprint', () => { for (const fold of closed) fold.open = false; });
})();
