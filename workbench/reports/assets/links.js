// Deep links: #L18H6 opens that head's card, or its row of the table where it has no card.
(() => {
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

  function go() {
    const name = report.parseHead(location.hash);
    document.querySelectorAll(".card.target").forEach((card) => card.classList.remove("target"));
    if (!name) return;
    const row = report.markRow?.(name);
    const card = document.getElementById(name);
    const goal = card || row;
    if (!goal) return;
    card?.classList.add("target");
    goal.scrollIntoView({ block: card ? "start" : "center", behavior: calm ? "auto" : "smooth" });
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
