// Cells of tables: React makes text of whatever a run is called.
var parts = (window.dashAgGridComponentFunctions = window.dashAgGridComponentFunctions || {});
const pageOf = { trace: "/pattern", patch: "/circuits", attribute: "/circuits", discover: "/circuits", evaluate: "/circuits" };
parts.RunLink = function (props) {
  const to = (pageOf[props.data.kind] || "/atlas") + "?run=" + encodeURIComponent(props.value);
  return props.data.status === "complete"
    ? React.createElement("a", { href: to }, props.value)
    : React.createElement("span", null, props.value);
};
parts.HeadLink = function (props) {
  const run = new URLSearchParams(location.search).get("run") || "";
  const to = "/head?head=" + encodeURIComponent(props.value) + (run ? "&run=" + encodeURIComponent(run) : "");
  return React.createElement("a", { href: to }, props.value);
};
