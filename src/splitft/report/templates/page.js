// Draws each chart in the colors of page.css, and again when the reader switches between light and dark.
const dark = matchMedia("(prefers-color-scheme: dark)");

function draw(figure) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue("--" + name).trim();
  const { data, layout } = JSON.parse(figure.querySelector("script").textContent, (key, value) =>
    key === "color" && typeof value === "string" ? value.replace(/^var\(--(\w+)\)$/, (_, name) => color(name)) : value);
  const axis = {
    gridcolor: color("rule"), linecolor: color("rule"), zeroline: false, title: { standoff: 8 },
  };
  const one = (given) => ({ ...axis, ...given, title: { ...axis.title, ...given.title } });
  Plotly.react(figure.querySelector(".chart"), data, {
    hovermode: "x unified", margin: { l: 56, r: 12, t: 8, b: 44 },
    ...layout,
    xaxis: one(layout.xaxis), yaxis: one(layout.yaxis),
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("quiet") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: color("panel"), bordercolor: color("rule"), font: { color: color("ink") } },
    legend: { orientation: "h", y: -0.2, yanchor: "top", x: 0, ...layout.legend },
  }, { responsive: true, displayModeBar: false });
}

function drawAll() {
  document.querySelectorAll("figure").forEach(draw);
}

drawAll();
dark.addEventListener("change", drawAll);
