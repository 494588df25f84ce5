"use strict";
(() => {
  const touch = matchMedia("(pointer: coarse)").matches;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const models = () => Bokeh.documents.flatMap((made) => [...made.all_models]);
  const figures = () => models().filter((model) => model.type === "Figure");

  // The colours are those of the page, whichever of its two palettes holds now or later. What is tagged with a custom
  // property wears it. Bokeh makes its document before it draws anything, so nothing flashes.
  function paint() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    for (const model of models()) {
      const [tag] = model.tags;
      if (tag && "line_color" in model.properties) model.line_color = colour(tag);
      if (tag && "fill_color" in model.properties) model.fill_color = colour(tag);
      if ("major_label_text_color" in model.properties) model.major_label_text_color = colour("--quiet");
      if ("axis_label_text_color" in model.properties) model.axis_label_text_color = colour("--quiet");
      if ("grid_line_color" in model.properties && model.grid_line_color) model.grid_line_color = colour("--line");
      if ("label_text_color" in model.properties) model.label_text_color = colour("--ink");
    }
  }

  // For whoever has neither mouse nor touch screen. All figures share one range of steps.
  function zoomable() {
    const range = figures()[0].x_range;
    const [first, last] = [range.start, range.end];
    const zoom = (by) => {
      if (!by) return figures().forEach((figure) => figure.reset.emit());
      const [middle, half] = [(range.start + range.end) / 2, ((range.end - range.start) / 2) * by];
      range.setv({ start: Math.max(first, middle - half), end: Math.min(last, middle + half) });
    };
    for (const button of document.querySelectorAll("[data-zoom]"))
      button.onclick = () => zoom(Number(button.dataset.zoom));
  }

  // Also for a page that embeds figures later, and others again.
  function start() {
    if (!Bokeh.documents.length) return setTimeout(start, 5);
    paint();
    zoomable();
    // One finger scrolls the page, two zoom; a figure takes one for a box once its toolbar says so.
    for (const model of models()) if (touch && model.type === "BoxZoomTool") model.active = false;
  }
  globalThis.paintFigures = paint;
  if (!document.currentScript.dataset.later) start();
  dark.addEventListener("change", paint);
})();
