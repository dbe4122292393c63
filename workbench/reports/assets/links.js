// Deep links: #L18H6 opens that head's card, or its row of the table where it has no card.
(() => {
  // Charts above the goal are drawn late and push it away; hold it in place until they are there or the reader moves.
  function hold(goal, block) {
    const watch = new ResizeObserver(() => goal.scrollIntoView({ block, behavior: "auto" }));
    const stop = () => watch.disconnect();
    watch.observe(document.body);
    setTimeout(stop, 2500);
    for (const move of ["wheel", "touchmove", "keydown", "mousedown"]) addEventListener(move, stop, { once: true });
  }

  const notice = document.getElementById("unknown");
  const dismiss = () => (notice.hidden = true);
  notice.querySelector("button").addEventListener("click", dismiss);
  addEventListener("keydown", (event) => event.key === "Escape" && dismiss());

  // a link may name a head of another model
  function tell(name) {
    const { layers, heads } = report.data.model;
    const [layer, head] = name.slice(1).split("H").map(Number);
    const beyond = (layers !== null && layer >= layers) || (heads !== null && head >= heads);
    notice.querySelector("span").textContent = beyond
      ? `No head ${name} in this model${layers && heads ? `: it has ${layers} layers of ${heads} heads` : ""}.`
      : `This report has no entry for head ${name}.`;
    notice.hidden = false;
  }

  // a report that was saved from a head's card opens there
  const first = document.documentElement.dataset.open;
  if (first && !location.hash) history.replaceState(null, "", `#${first}`);

  function go() {
    const name = report.parseHead(location.hash);
    dismiss();
    document.querySelectorAll(".card.target").forEach((card) => card.classList.remove("target"));
    if (!name) return;
    const row = report.markRow?.(name);
    const card = document.getElementById(name);
    const goal = card || row;
    if (!goal) return tell(name);
    card?.classList.add("target");
    hold(goal, card ? "start" : "center");
    const focus = card ? card.querySelector("h3") : row.querySelector("a");
    focus?.focus({ preventScroll: true });
  }

  window.addEventListener("hashchange", go);
  // a second click on the same link changes no hash but should still lead there
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='#L']");
    if (link && link.getAttribute("href") === location.hash) go();
  });

  // the section in view is marked in the bar
  const links = new Map([...document.querySelectorAll(".bar nav a")].map((a) => [a.getAttribute("href").slice(1), a]));
  const watch = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        links.forEach((link) => link.removeAttribute("aria-current"));
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    },
    { rootMargin: "-20% 0px -70% 0px" },
  );
  document.querySelectorAll("main > section[id]").forEach((section) => watch.observe(section));

  // after the browser's own jump to the fragment, which would take the focus away again
  const settled = () => report.chartsReady.then(() => setTimeout(go));
  if (location.hash && document.readyState === "complete") settled();
  else if (location.hash) window.addEventListener("load", settled);
})();
