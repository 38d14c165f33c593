// Draws each chart of the page in the page's own colours, and again when the reader's light changes.
const dark = matchMedia("(prefers-color-scheme: dark)");

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue("--" + name).trim();
  return { ink: of("ink"), faint: of("faint"), quiet: of("quiet"), rule: of("rule"), panel: of("panel") };
}

function draw(figure) {
  const theme = colours();
  const { data, layout } = JSON.parse(figure.querySelector("script").textContent, (key, value) =>
    key === "color" && value in theme ? theme[value] : value);
  const axis = {
    gridcolor: theme.rule, linecolor: theme.rule, zeroline: false, title: { standoff: 8 },
  };
  const one = (given) => ({ ...axis, ...given, title: { ...axis.title, ...given.title } });
  Plotly.react(figure.querySelector(".chart"), data, {
    hovermode: "x unified", margin: { l: 56, r: 12, t: 8, b: 44 },
    ...layout,
    xaxis: one(layout.xaxis), yaxis: one(layout.yaxis),
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: theme.quiet },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: theme.panel, bordercolor: theme.rule, font: { color: theme.ink } },
    legend: { orientation: "h", y: -0.2, yanchor: "top", x: 0, ...layout.legend },
  }, { responsive: true, displayModeBar: false });
}

function drawAll() {
  document.querySelectorAll("figure").forEach(draw);
}

drawAll();
dark.addEventListener("change", drawAll);
