// Draws the plotly figures: each when it comes near the window, again when the mode changes, all before printing.
(() => {
  const { figures, templates } = report.data;
  const settings = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };
  const waiting = new Set();
  const drawn = new Set();

  // plotly.js is in the page as a script, or packed as base64 of gzip
  async function unpack() {
    const store = document.getElementById("plotly-packed");
    if (window.Plotly || !store) return;
    const bytes = Uint8Array.from(atob(store.textContent.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  function inMode(name) {
    const { figure, dark } = figures[name];
    const copy = structuredClone(figure);
    if (report.mode() === "dark") {
      for (const [path, value] of dark) {
        const owner = path.slice(0, -1).reduce((part, key) => part[key], copy);
        owner[path.at(-1)] = value;
      }
    }
    copy.layout.template = templates[report.mode()];
    return copy;
  }

  // lets the drawing shrink to the paper: the print style sheet sets widths in percent
  function scalable(canvas) {
    for (const drawing of canvas.querySelectorAll(".main-svg")) {
      const [width, height] = [drawing.getAttribute("width"), drawing.getAttribute("height")];
      drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
      canvas.style.setProperty("--ratio", `${width} / ${height}`);
    }
  }

  function draw(canvas) {
    const figure = inMode(canvas.dataset.figure);
    const first = !drawn.has(canvas);
    waiting.delete(canvas);
    drawn.add(canvas);
    Plotly.react(canvas, figure.data, figure.layout, settings);
    scalable(canvas);
    if (!first) return;
    canvas.removeAttribute("aria-busy");
    canvas.on("plotly_afterplot", () => scalable(canvas));
    canvas.on("plotly_click", (event) => {
      const head = report.parseHead(event.points?.[0]?.customdata?.[0]);
      if (head) location.hash = head;
    });
  }

  const near = new IntersectionObserver(
    (entries) => entries.filter((e) => e.isIntersecting && waiting.has(e.target)).forEach((e) => draw(e.target)),
    { rootMargin: "700px" },
  );

  report.showFigure = (canvas, name) => {
    if (!(name in figures)) return;
    canvas.dataset.figure = name;
    canvas.style.height = `${figures[name].height}px`;
    canvas.setAttribute("aria-label", figures[name].caption);
    canvas.closest("figure").querySelector("figcaption").textContent = figures[name].caption;
    if (window.Plotly) draw(canvas);
  };

  async function start() {
    await unpack();
    document.documentElement.dataset.charts = window.Plotly ? "ready" : "none";
    if (!window.Plotly) return;
    for (const canvas of document.querySelectorAll(".canvas[data-figure]")) {
      waiting.add(canvas);
      near.observe(canvas);
    }
    document.addEventListener("themechange", () => drawn.forEach(draw));
    window.addEventListener("beforeprint", () => [...waiting].forEach(draw));
  }
  report.chartsReady = start();
})();
