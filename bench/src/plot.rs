//! The figures of a report as an SVG picture: bars for `relay`, `idle` and `fleet`, lines over the rate for `tasks`.

use crate::report::{Report, Rows};
use std::fmt::Write;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 60.0;
/// The most room for a name under a picture.
const LEGEND: f64 = 180.0;
const FOREGROUND: &str = "#222";
const COLOURS: [&str; 6] = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1"];

/// (x, y), in order of x.
pub(crate) type Points = Vec<(f64, f64)>;
/// A name, its dashed and its solid line.
pub(crate) type Curve<'a> = (&'a str, Points, Points);

/// The whole picture as text.
#[must_use]
pub(crate) fn svg(report: &Report) -> String {
    let mut picture = Picture::default();
    match &report.rows {
        Rows::Relay(rows) => {
            picture.title(&format!("Chunks of {} bytes a second", report.chunk_bytes));
            let bars: Vec<_> = rows
                .iter()
                .map(|r| {
                    (
                        r.line.to_owned(),
                        r.frames_per_second,
                        format!("{:.0} ({:.2})", r.frames_per_second, r.ratio_to_bare),
                    )
                })
                .collect();
            picture.bars(&bars);
        }
        Rows::Idle(rows) => {
            picture.title("Bytes of memory per stream that waits");
            let bars: Vec<_> = rows
                .iter()
                .map(|r| (format!("{}, {}", r.line, r.state), r.bytes_per_stream, format!("{:.0}", r.bytes_per_stream)))
                .collect();
            picture.bars(&bars);
        }
        Rows::Fleet(rows) => {
            picture.title("Microseconds of the routers' CPU for a frame (frames a second)");
            let bars: Vec<_> = rows
                .iter()
                .map(|r| {
                    let label = format!("{:.1} ({:.0}/s)", r.cpu_us_per_frame, r.frames_per_second);
                    (r.line.clone(), r.cpu_us_per_frame, label)
                })
                .collect();
            picture.bars(&bars);
        }
        Rows::Tasks(rows) => {
            picture.title("Milliseconds from the due time to the bill, over tasks a second (p50 dashed, p99 solid)");
            let mut lines: Vec<&str> = rows.iter().map(|r| r.line).collect();
            lines.dedup();
            let of = |line: &str, value: fn(&crate::report::TaskRow) -> f64| {
                let rows = rows.iter().filter(|r| r.line == line && r.done > 0);
                rows.map(|r| (r.offered_per_second as f64, value(r))).collect::<Points>()
            };
            let curves: Vec<_> =
                lines.iter().map(|line| (*line, of(line, |r| r.p50_ms), of(line, |r| r.p99_ms))).collect();
            picture.curves(&curves);
        }
    }
    picture.finish()
}

/// The body of a picture as it grows.
#[derive(Default)]
pub(crate) struct Picture {
    body: String,
}

impl Picture {
    pub(crate) fn title(&mut self, text: &str) {
        self.text(WIDTH / 2.0, 24.0, "middle", 15, text);
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, size: u32, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" font-size="{size}" font-family="sans-serif" fill="{FOREGROUND}">{text}</text>"#
        );
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str) {
        let _ = writeln!(
            self.body,
            r#"<line x1="{:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}" stroke="{colour}"/>"#,
            from.0, from.1, to.0, to.1
        );
    }

    /// Lines across at round values, and the scale that maps a value to its height.
    fn scale(&mut self, max: f64) -> impl Fn(f64) -> f64 + use<> {
        let step = round_step(max / 5.0);
        let top = (max / step).ceil().max(1.0) * step;
        let y = move |value: f64| HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM);
        let mut at = 0.0;
        while at <= top + step / 2.0 {
            self.line((LEFT, y(at)), (WIDTH - RIGHT, y(at)), "#ddd");
            self.text(LEFT - 8.0, y(at) + 4.0, "end", 11, &short(at));
            at += step;
        }
        y
    }

    fn bars(&mut self, bars: &[(String, f64, String)]) {
        let y = self.scale(bars.iter().map(|b| b.1).fold(0.0, f64::max));
        let slot = (WIDTH - LEFT - RIGHT) / bars.len().max(1) as f64;
        for (i, (name, value, label)) in bars.iter().enumerate() {
            let x = LEFT + slot * i as f64;
            let _ = writeln!(
                self.body,
                r#"<rect x="{:.1}" y="{:.1}" width="{:.1}" height="{:.1}" fill="{}"/>"#,
                x + slot * 0.15,
                y(*value),
                slot * 0.7,
                HEIGHT - BOTTOM - y(*value),
                COLOURS[i % COLOURS.len()]
            );
            self.text(x + slot / 2.0, y(*value) - 6.0, "middle", 12, label);
            self.text(x + slot / 2.0, HEIGHT - BOTTOM + 18.0, "middle", 12, name);
        }
    }

    pub(crate) fn curves(&mut self, curves: &[Curve<'_>]) {
        let all = || curves.iter().flat_map(|(_, dashed, solid)| dashed.iter().chain(solid));
        let y = self.scale(all().map(|p| p.1).fold(0.0, f64::max));
        let rate_max = all().map(|p| p.0).fold(1.0, f64::max);
        let x = |rate: f64| LEFT + rate / rate_max * (WIDTH - LEFT - RIGHT);
        let mut rates: Vec<f64> = all().map(|p| p.0).collect();
        rates.sort_by(f64::total_cmp);
        rates.dedup();
        for rate in rates {
            self.text(x(rate), HEIGHT - BOTTOM + 18.0, "middle", 11, &short(rate));
        }
        let room = LEGEND.min((WIDTH - RIGHT) / curves.len() as f64);
        let from = LEFT.min(WIDTH - room * curves.len() as f64);
        for (i, (name, dashed, solid)) in curves.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            for (points, dash) in [(dashed, r#" stroke-dasharray="5 4""#), (solid, "")] {
                let path: Vec<String> = points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
                let _ = writeln!(
                    self.body,
                    r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>"#,
                    path.join(" ")
                );
            }
            let at = from + room * i as f64;
            self.line((at, HEIGHT - 22.0), (at + 24.0, HEIGHT - 22.0), colour);
            self.text(at + 30.0, HEIGHT - 18.0, "start", 12, name);
        }
    }

    pub(crate) fn finish(self) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{}</svg>\n",
            self.body
        )
    }
}

/// 1, 2 or 5 times a power of ten, at least `step`.
fn round_step(step: f64) -> f64 {
    if step <= 0.0 {
        return 1.0;
    }
    let power = 10_f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|n| *n >= step * 0.999).unwrap_or(power * 10.0)
}

fn short(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.1} M", v / 1e6),
        v if v >= 1e4 => format!("{:.0} k", v / 1e3),
        v if v >= 10.0 || v == 0.0 => format!("{v:.0}"),
        v => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::BenchArgs;
    use crate::report::{IdleRow, TaskRow};
    use clap::Parser;

    #[test]
    fn steps_are_round() {
        for (step, round) in [(0.9, 1.0), (1.0, 1.0), (1.2, 2.0), (33_000.0, 50_000.0), (0.07, 0.1)] {
            assert!((round_step(step) - round).abs() < round * 1e-6, "{step}");
        }
    }

    #[test]
    fn a_picture_has_a_bar_or_a_curve_for_each_row() {
        let args = |scenario| BenchArgs::try_parse_from(["bench", scenario]).expect("parses");
        let idle = |line, bytes_per_stream| IdleRow {
            line,
            state: "waiting",
            streams: 10,
            connections: 1,
            resident_bytes: 1,
            bytes_per_stream,
        };
        let report = Report::new(&args("idle"), Rows::Idle(vec![idle("limits off", 900.0), idle("<&>", 0.0)]));
        let text = svg(&report);
        assert_eq!(text.matches("<rect x").count(), 2);
        assert!(text.contains("&lt;&amp;&gt;, waiting") && text.starts_with("<svg") && text.ends_with("</svg>\n"));
        let task = |offered_per_second, p99_ms| TaskRow {
            line: "durable",
            offered_per_second,
            done_per_second: 1.0,
            tasks: 1,
            done: 1,
            not_done: 0,
            unanswered: 0,
            never_submitted: 0,
            first_not_done: None,
            p50_ms: 1.0,
            p90_ms: 1.0,
            p99_ms,
            max_ms: 9.0,
            cpu_seconds: None,
            peak_rss_bytes: None,
        };
        let text = svg(&Report::new(&args("tasks"), Rows::Tasks(vec![task(100, 2.0), task(200, 7.5)])));
        assert_eq!(text.matches("<polyline").count(), 2);
    }
}
