// The head table: sorting, filtering and paging over columns of numbers.
(() => {
  const root = document.getElementById("all-heads");
  if (!root || !report.data.table) return;
  const { heads, columns } = report.data.table;
  const { make, number, probability } = report;
  const detailed = columns.length > 0 && "q" in columns[0];
  const field = (name) => root.querySelector(`[name=${name}]`);
  const body = root.querySelector("tbody");
  const state = { sort: -1, down: true, page: 0, marked: null };
  const tops = columns.map((column) => Math.max(...column.value.filter((v) => v !== null).map(Math.abs), 1e-9));
  const places = tops.map((top) => (top >= 0.1 ? 2 : top >= 0.01 ? 3 : 4));
  const pair = (name) => name.slice(1).split("H").map(Number);

  // "L18" is a layer, "H6" a head in any layer, "L18H6" one head; several are separated by spaces or commas
  function textFilter(text) {
    const words = text.trim().split(/[\s,;]+/).filter(Boolean);
    if (!words.length) return () => true;
    const tests = words.map((word) => {
      const match = /^(?:L(\d+))?(?:H(\d+))?$/i.exec(word);
      if (!match) return (name) => name.toLowerCase().includes(word.toLowerCase());
      return (name) => {
        const [layer, head] = pair(name);
        return (match[1] === undefined || layer === +match[1]) && (match[2] === undefined || head === +match[2]);
      };
    });
    return (name) => tests.some((test) => test(name));
  }

  // some detectors look for small values, some for large ones of either sign
  const reaches = (column, value, bound) =>
    value !== null &&
    bound !== null &&
    { higher: value >= bound, lower: value <= bound, either: Math.abs(value) >= bound }[column.better];

  function valueFilter() {
    const chosen = field("detector").value;
    const bound = parseFloat(field("least").value);
    if (chosen === "" || Number.isNaN(bound)) return () => true;
    const column = columns[Number(chosen)];
    return (index) => reaches(column, column.value[index], bound);
  }

  function rows() {
    const [byText, byValue] = [textFilter(field("text").value), valueFilter()];
    const kept = heads.map((_, index) => index).filter((index) => byText(heads[index]) && byValue(index));
    const sign = state.down ? -1 : 1;
    if (state.sort < 0) return state.down ? kept : kept.reverse();
    const { value } = columns[state.sort];
    // heads without a value come last in both directions
    return kept.sort((a, b) => {
      if (value[a] === null || value[b] === null) return (value[a] === null) - (value[b] === null);
      return sign * (value[a] - value[b]) || a - b;
    });
  }

  const range = ({ low, high }, place, index) =>
    low[index] === null ? "" : `${number(low[index], places[place])} to ${number(high[index], places[place])}`;

  function cell(column, place, index) {
    const value = column.value[index];
    const box = make("td");
    if (value === null) {
      box.append("–");
      return box;
    }
    // the threshold alone makes no head: its score has to differ from the null as well
    const reached = reaches(column, value, column.threshold);
    const weak = reached && column.weak.includes(index);
    box.classList.toggle("passes", reached && !weak);
    box.classList.toggle("reaches", weak);
    if (weak) box.title = "reaches the threshold, not distinguished from the null";
    box.style.setProperty("--share", `${Math.round((Math.abs(value) / tops[place]) * 100)}%`);
    const shown = make("span", { class: "value" }, number(value, places[place]));
    if (!detailed) box.append(shown);
    else {
      // q beside the value, the interval below: two lines, and columns narrow enough for eleven detectors
      box.append(make("span", { class: "pair" }, make("span", { class: "q" }, `q ${probability(column.q[index])}`), shown));
      box.append(make("span", { class: "span" }, range(column, place, index)));
      box.classList.toggle("weak", column.q[index] !== null && column.q[index] >= 0.05);
    }
    return box;
  }

  function line(index) {
    const name = heads[index];
    const row = make("tr", {}, make("th", { scope: "row" }, make("a", { class: "head", href: `#${name}` }, name)));
    row.id = `row-${name}`;
    row.classList.toggle("marked", name === state.marked);
    row.append(...columns.map((column, place) => cell(column, place, index)));
    return row;
  }

  function show() {
    const kept = rows();
    const size = Number(field("size").value) || kept.length || 1;
    const pages = Math.max(1, Math.ceil(kept.length / size));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    body.replaceChildren(...kept.slice(state.page * size, (state.page + 1) * size).map(line));
    root.querySelector(".count").textContent = `${kept.length} of ${heads.length} heads`;
    root.querySelector(".page").textContent = `${state.page + 1} / ${pages}`;
    field("back").disabled = state.page === 0;
    field("next").disabled = state.page >= pages - 1;
    root.querySelectorAll("thead th").forEach((header, place) => {
      const active = place - 1 === state.sort;
      const order = (state.sort < 0) === state.down ? "ascending" : "descending";
      header.setAttribute("aria-sort", active ? order : "none");
    });
    return { kept, size };
  }

  function nameBound(better) {
    const words = { higher: "at least", lower: "at most", either: "at least ±" };
    root.querySelector(".bound").textContent = words[better];
  }

  const anew = () => {
    state.page = 0;
    show();
  };

  root.querySelectorAll("thead button").forEach((button, place) => {
    button.addEventListener("click", () => {
      state.down = state.sort === place - 1 ? !state.down : true;
      state.sort = place - 1;
      anew();
    });
  });
  for (const name of ["text", "least"]) field(name).addEventListener("input", anew);
  field("size").addEventListener("change", anew);
  field("detector").addEventListener("change", (event) => {
    const column = columns[Number(event.target.value)];
    const picked = event.target.value !== "";
    field("least").value = picked && column.threshold !== null ? column.threshold : "";
    nameBound(picked ? column.better : "higher");
    if (picked) [state.sort, state.down] = [Number(event.target.value), column.better !== "lower"];
    anew();
  });
  field("reset").addEventListener("click", () => {
    for (const name of ["text", "least", "detector"]) field(name).value = "";
    nameBound("higher");
    Object.assign(state, { sort: -1, down: true });
    anew();
  });
  for (const [name, step] of [["back", -1], ["next", 1]]) {
    field(name).addEventListener("click", () => {
      state.page += step;
      show();
    });
  }

  // paper has no pages to turn: all rows of the filter at once, and a word about those that it hides
  let turned = null;
  window.addEventListener("beforeprint", () => {
    turned ??= { size: field("size").value, page: state.page };
    field("size").value = "0";
    const { kept } = show();
    const hidden = heads.length - kept.length;
    const note = root.querySelector(".left-out");
    note.hidden = hidden === 0;
    note.textContent = `${hidden} of ${heads.length} heads are left out by the filter that was set when this was printed.`;
  });
  window.addEventListener("afterprint", () => {
    if (!turned) return;
    field("size").value = turned.size;
    state.page = turned.page;
    turned = null;
    show();
  });

  // brings a head's row into view; clears filters that hide it
  report.markRow = (name) => {
    if (!heads.includes(name)) return null;
    state.marked = name;
    let { kept, size } = show();
    if (!kept.some((index) => heads[index] === name)) {
      for (const key of ["text", "least", "detector"]) field(key).value = "";
      ({ kept, size } = show());
    }
    state.page = Math.floor(kept.findIndex((index) => heads[index] === name) / size);
    show();
    return document.getElementById(`row-${name}`);
  };
  show();
})();
