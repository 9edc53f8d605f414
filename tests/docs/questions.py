"""What a page is asked in a browser, as scripts."""

# Ratios of contrast below 4.5, of texts and what is behind them.
CONTRAST = """(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const parts = [r, g, b].map((x) => x / 255).map(
      (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const over = (top, below) => {
    const alpha = top[3] ?? 1;
    return [0, 1, 2].map((i) => alpha * top[i] + (1 - alpha) * below[i]);
  };
  const behind = (node) => {
    if (!node) return [255, 255, 255];
    const own = channels(getComputedStyle(node).backgroundColor);
    return (own[3] ?? 1) === 1 ? own : over(own, behind(node.parentElement));
  };
  const found = [];
  const article = document.querySelector("article");
  const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    const shown = texts.currentNode.data.trim() && node.getClientRects().length;
    if (!shown || node.closest("style, .headerlink, button")) continue;
    const style = getComputedStyle(node);
    const below = node.closest("svg") ? behind(node.closest("svg")) : behind(node);
    const color = node.closest("svg") ? style.fill : style.color;
    const pair = [light(over(channels(color), below)), light(below)];
    pair.sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) found.push([texts.currentNode.data.trim(), color, ratio]);
  }
  return found;
})()"""

SEARCH = """new Promise((resolve, reject) => {
  const input = document.querySelector("input.md-search__input");
  input.focus();
  input.value = "latency_table";
  input.dispatchEvent(new Event("input", { bubbles: true }));
  input.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true }));
  let tries = 0;
  const timer = setInterval(() => {
    const hits = [...document.querySelectorAll("a.md-search-result__link")];
    if (hits.length || ++tries > 100) {
      clearInterval(timer);
      resolve(hits.map((hit) => hit.href));
    }
  }, 50);
})"""
