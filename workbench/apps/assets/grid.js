// Cells of tables: React makes text of whatever a run is called.
var parts = (window.dashAgGridComponentFunctions = window.dashAgGridComponentFunctions || {});
parts.RunLink = function (props) {
  // The server knows which page can show the run.
  return props.data.to
    ? React.createElement("a", { href: props.data.to }, props.value)
    : React.createElement("span", null, props.value);
};
parts.HeadLink = function (props) {
  const run = new URLSearchParams(location.search).get("run") || "";
  const to = "/head?head=" + encodeURIComponent(props.value) + (run ? "&run=" + encodeURIComponent(run) : "");
  return React.createElement("a", { href: to }, props.value);
};
