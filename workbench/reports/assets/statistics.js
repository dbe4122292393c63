// The token view of a trace: each token shaded by one statistic of one head.
(() => {
  const root = document.getElementById("reading");
  const { reading } = report.data;
  if (!root || !reading) return;
  const { make, shade, quoted, number } = report;
  const [statistic, head] = ["statistic", "head"].map((name) => root.querySelector(`[name=${name}]`));
  const [words, says, range] = [".words", ".says", ".range"].map((name) => root.querySelector(name));
  const NONE = 65535;
  const spans = report.setWords(words, reading.tokens);
  const state = { at: Math.min(1, spans.length - 1), values: [], low: 0, high: 1 };

  // 16-bit steps between the lowest and the highest value; the last one stands for none
  function unpack({ low, high, steps }) {
    const bytes = Uint8Array.from(atob(steps), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return spans.map((_, index) => {
      const step = view.getUint16(2 * index, true);
      return step === NONE ? null : low + ((high - low) * step) / (NONE - 1);
    });
  }

  const digits = (value) => (value !== null && value !== 0 && Math.abs(value) < 0.1 ? 4 : 2);
  const told = (value) => number(value, digits(value));

  function load() {
    const chosen = reading.statistics[Number(statistic.value)];
    state.values = unpack(chosen.rows[Number(head.value)]);
    const shown = state.values.filter((value, index) => value !== null && (index > 0 || state.values.length === 1));
    // colours begin at zero, or at the lowest value where that is below it
    state.low = Math.min(0, ...shown);
    state.high = Math.max(...shown, state.low + 1e-9);
    range.textContent = `colours: ${told(state.low)} to ${told(state.high)}${chosen.unit ? ` (${chosen.unit})` : ""}`;
    paint();
  }

  function paint() {
    const span = state.high - state.low;
    spans.forEach((word, index) => {
      const value = state.values[index];
      const share = value === null || index === 0 ? 0 : (value - state.low) / span;
      const colours = share < 0.02 ? { back: "", ink: "" } : shade(share);
      word.style.background = colours.back;
      word.style.color = colours.ink;
      word.classList.toggle("first", index === 0);
      word.classList.toggle("masked", value === null);
      word.title = `${quoted(reading.tokens[index])} ${told(value)}`;
    });
    select(state.at);
  }

  function select(index) {
    spans[state.at].classList.remove("query");
    spans[state.at].tabIndex = -1;
    state.at = index;
    spans[index].classList.add("query");
    spans[index].tabIndex = 0;
    const chosen = reading.statistics[Number(statistic.value)];
    says.replaceChildren(
      make("strong", {}, quoted(reading.tokens[index])),
      ` at position ${index}, ${reading.heads[Number(head.value)]}: ${chosen.title} `,
      make("b", {}, told(state.values[index])),
      chosen.unit ? ` (${chosen.unit})` : "",
    );
  }

  const indexOf = (target) => {
    const word = target.closest?.(".word");
    return word ? Number(word.dataset.index) : null;
  };
  for (const kind of ["pointerover", "focusin", "click"]) {
    words.addEventListener(kind, (event) => {
      const index = indexOf(event.target);
      if (index !== null) select(index);
    });
  }
  words.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 }[event.key];
    if (move === undefined) return;
    select(Math.max(0, Math.min(spans.length - 1, state.at + move)));
    spans[state.at].focus();
    event.preventDefault();
  });
  statistic.addEventListener("change", () => {
    head.value = String(reading.statistics[Number(statistic.value)].start);
    load();
  });
  head.addEventListener("change", load);
  document.addEventListener("themechange", paint);
  head.value = String(reading.statistics[0].start);
  load();
})();
