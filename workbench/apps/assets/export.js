// Saves the figure beside a button as a picture or as the numbers that it shows.
(function () {
  function save(name, blob) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
  // plotly keeps large arrays as typed arrays, or as {bdata, dtype, shape} until it has drawn them.
  const list = (value) => (value === undefined || value === null ? [] : Array.from(value));
  const plain = (text) => (typeof text === "string" ? text.replace(/<[^>]*>/g, "") : text);
  function cell(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "";
    let text = Array.isArray(value) ? value.map(plain).join("; ") : String(plain(value));
    // A cell that begins so would be a formula in a spreadsheet; numbers are left alone.
    if (/^[=+\-@\t\r]/.test(text) && !Number.isFinite(Number(text))) text = "'" + text;
    return /[",\n\r]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
  }
  function rows(trace, number) {
    const name = trace.name || "trace " + number;
    if (trace.z) {
      const z = list(trace.z).map(list);
      const x = list(trace.x), y = list(trace.y);
      return z.flatMap((row, i) => row.map((value, j) => [name, x.length ? x[j] : j, y.length ? y[i] : i, value]));
    }
    const x = list(trace.x), y = list(trace.y), text = trace.text === undefined ? [] : list(trace.text);
    return Array.from({ length: Math.max(x.length, y.length) }, (_, i) => [name, x[i], y[i], text[i]]);
  }
  function csv(graph) {
    const lines = (graph._fullData || graph.data).flatMap((trace, number) => rows(trace, number));
    const head = ["series", "x", "y", "value or label"];
    return [head, ...lines].map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
  }
  document.addEventListener("click", function (event) {
    const button = event.target.closest && event.target.closest("[data-export]");
    if (!button) return;
    const figure = button.closest("figure");
    const graph = figure && figure.querySelector(".js-plotly-plot");
    if (!graph) return;
    const name = (figure.dataset.title || "figure").replace(/[^\w-]+/g, "-").slice(0, 60) || "figure";
    if (button.dataset.export === "csv") {
      save(name + ".csv", new Blob([csv(graph)], { type: "text/csv" }));
    } else {
      const box = graph.getBoundingClientRect();
      const ground = getComputedStyle(document.documentElement).getPropertyValue("--surface").trim();
      Plotly.toImage(
        { data: graph.data, layout: { ...graph.layout, paper_bgcolor: ground } },
        { format: button.dataset.export, width: Math.round(box.width), height: Math.round(box.height), scale: 2 }
      ).then((address) => fetch(address)).then((answer) => answer.blob()).then((blob) => save(name + "." + button.dataset.export, blob));
    }
  });
})();
