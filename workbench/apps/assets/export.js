// Saves the figure beside a button as a picture or as the numbers that it shows, and a page's run as a report.
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
  function tell(title, message, color) {
    const note = { action: "show", title: title, message: message, color: color, autoClose: 12000 };
    dash_clientside.set_props("notifications", { sendNotifications: [note] });
  }
  // A zoomable pattern writes its view into the address as it moves: what is at hand is what is saved.
  function atHand(address) {
    const [path, text] = address.split("?");
    const fields = new URLSearchParams(text), here = new URLSearchParams(location.search);
    if (!fields.has("pattern")) return address;
    for (const name of ["row", "key", "span", "how", "scale", "top", "first"]) {
      if (here.has(name)) fields.set(name, here.get(name)); else fields.delete(name);
    }
    return path + "?" + fields;
  }
  async function exportPage(clicks, address) {
    if (!clicks || !address) return false;
    address = atHand(address);
    dash_clientside.set_props("export-page", { loading: true });
    try {
      const answer = await fetch(address);
      if (!answer.ok) throw new Error((await answer.json()).error);
      const named = /filename="?([^";]+)/.exec(answer.headers.get("Content-Disposition") || "");
      const blob = await answer.blob();
      save(named ? named[1] : "report.html", blob);
      tell("Saved", (named ? named[1] : "The report") + ", " + (blob.size / 1e6).toFixed(1) + " MB, opens offline", "teal");
    } catch (error) {
      tell("Not exported", String(error.message).slice(0, 600), "orange");
    }
    return false;
  }
  window.dash_clientside = Object.assign({}, window.dash_clientside, { workbench: { exportPage: exportPage } });
})();
