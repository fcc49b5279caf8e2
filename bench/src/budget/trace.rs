//! Arrival traces: reads the public CSV formats (Azure LLM inference 2023 and 2024, BurstGPT) and names line and column of
//! what it can't read. It never guesses a value and never changes a length.

use anyhow::{Context, bail, ensure};
use atp_core::clock::days_to_month;
use std::io::BufRead;

/// More than any context window; a larger figure is a broken row.
const TOKENS_MAX: u64 = 1_000_000;

/// One question of the trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Task {
    /// Milliseconds since the first row.
    pub(crate) at_ms: u64,
    pub(crate) in_tokens: u64,
    pub(crate) out_tokens: u64,
    /// Index into `Trace::models`.
    pub(crate) model: usize,
}

/// Tasks in order of arrival.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trace {
    pub(crate) tasks: Vec<Task>,
    pub(crate) models: Vec<String>,
    /// Rows without an answer (0 response tokens: a request that failed); they are left out.
    pub(crate) unanswered: u64,
}

#[derive(Clone, Copy)]
enum Time {
    /// `2023-11-16 18:17:03.9799600`, with or without an offset.
    Calendar,
    /// Seconds since whatever, with or without a fraction.
    Seconds,
}

/// Where the header has what is read.
struct Columns {
    time: (usize, Time),
    input: usize,
    output: usize,
    model: Option<usize>,
    names: Vec<String>,
}

impl Columns {
    fn of(header: &str) -> anyhow::Result<Self> {
        let names: Vec<String> =
            header.trim_start_matches('\u{feff}').split(',').map(|n| n.trim().to_owned()).collect();
        let find = |name: &str| names.iter().position(|n| n.eq_ignore_ascii_case(name));
        let time = find("Timestamp");
        let found = match (time, find("ContextTokens"), find("GeneratedTokens")) {
            (Some(time), Some(input), Some(output)) => Some(((time, Time::Calendar), input, output, None)),
            _ => match (time, find("Request tokens"), find("Response tokens")) {
                (Some(time), Some(input), Some(output)) => Some(((time, Time::Seconds), input, output, find("Model"))),
                _ => None,
            },
        };
        let Some((time, input, output, model)) = found else {
            bail!(
                "line 1: the header is neither Azure's (TIMESTAMP,ContextTokens,GeneratedTokens) nor BurstGPT's \
                 (Timestamp,Model,Request tokens,Response tokens,...)"
            );
        };
        Ok(Self { time, input, output, model, names })
    }

    fn cell<'a>(&self, cells: &[&'a str], column: usize) -> anyhow::Result<&'a str> {
        let cell = cells.get(column).map(|c| c.trim());
        cell.with_context(|| format!("column {} (`{}`) is missing", column + 1, self.names[column]))
    }

    fn tokens(&self, cells: &[&str], column: usize) -> anyhow::Result<u64> {
        let cell = self.cell(cells, column)?;
        let name = || format!("column {} (`{}`)", column + 1, self.names[column]);
        let tokens: u64 = cell.parse().with_context(|| format!("{}: `{cell}` isn't a whole number", name()))?;
        ensure!(tokens <= TOKENS_MAX, "{}: {tokens} is above {TOKENS_MAX}", name());
        Ok(tokens)
    }

    fn at_ms(&self, cells: &[&str]) -> anyhow::Result<u64> {
        let (column, time) = self.time;
        let cell = self.cell(cells, column)?;
        let (at, form) = match time {
            Time::Calendar => (calendar_ms(cell), "a time like 2023-11-16 18:17:03.9799600"),
            Time::Seconds => (decimal_ms(cell), "a number of seconds"),
        };
        at.with_context(|| format!("column {} (`{}`): `{cell}` isn't {form}", column + 1, self.names[column]))
    }
}

impl Trace {
    /// Reads at most `rows_max` answered rows.
    ///
    /// # Errors
    /// Names the line and the column that can't be read.
    pub(crate) fn read(source: impl BufRead, rows_max: usize) -> anyhow::Result<Self> {
        let mut lines = source.lines();
        let columns = Columns::of(&lines.next().context("line 1: the file is empty")??)?;
        let mut trace = Self { tasks: Vec::new(), models: Vec::new(), unanswered: 0 };
        for (number, line) in (2..).zip(lines) {
            if trace.tasks.len() == rows_max {
                break;
            }
            let line = line.with_context(|| format!("line {number}"))?;
            if !line.trim().is_empty() {
                trace.row(&columns, &line).with_context(|| format!("line {number}"))?;
            }
        }
        trace.tasks.sort_by_key(|task| task.at_ms);
        let first = trace.tasks.first().map_or(0, |task| task.at_ms);
        trace.tasks.iter_mut().for_each(|task| task.at_ms -= first);
        Ok(trace)
    }

    fn row(&mut self, columns: &Columns, line: &str) -> anyhow::Result<()> {
        let cells: Vec<&str> = line.split(',').collect();
        let model = columns.model.map_or(Ok("default"), |column| columns.cell(&cells, column))?;
        let (at_ms, in_tokens) = (columns.at_ms(&cells)?, columns.tokens(&cells, columns.input)?);
        let out_tokens = columns.tokens(&cells, columns.output)?;
        if out_tokens == 0 {
            self.unanswered += 1;
            return Ok(());
        }
        let model = self.models.iter().position(|m| m == model).unwrap_or_else(|| {
            self.models.push(model.to_owned());
            self.models.len() - 1
        });
        self.tasks.push(Task { at_ms, in_tokens, out_tokens, model });
        Ok(())
    }

    /// Arrivals `speed` times as fast.
    pub(crate) fn faster(mut self, speed: u64) -> Self {
        self.tasks.iter_mut().for_each(|task| task.at_ms /= speed);
        self
    }
}

/// Milliseconds of `12`, `12.5` or `12.0625`; what is finer is cut off.
fn decimal_ms(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |t: &str| t.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || whole.len() > 12 || !digits(whole) || !digits(fraction) {
        return None;
    }
    let ms: String = fraction.chars().chain("000".chars()).take(3).collect();
    Some(whole.parse::<u64>().ok()? * 1000 + ms.parse::<u64>().ok()?)
}

/// Milliseconds since 1970 of `date time[fraction][offset]`; without an offset it is UTC.
fn calendar_ms(text: &str) -> Option<u64> {
    let (date, time) = text.split_once([' ', 'T'])?;
    let (time, offset_minutes) = match time.find(['+', '-', 'Z']) {
        Some(at) => (&time[..at], offset(&time[at..])?),
        None => (time, 0),
    };
    let [year, month, day] = parts(date, '-')?;
    let (clock, seconds) = time.rsplit_once(':')?;
    let [hour, minute] = parts(clock, ':')?;
    let seconds_ms = decimal_ms(seconds)?;
    let sane = (1970..=9999).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
    if !sane || hour > 23 || minute > 59 || seconds_ms >= 61_000 {
        return None;
    }
    let days = days_to_month(u64::try_from(year).ok()?, u64::try_from(month).ok()?);
    let minutes = ((i64::try_from(days).ok()? + day - 1) * 24 + hour) * 60 + minute;
    u64::try_from((minutes - offset_minutes) * 60_000 + i64::try_from(seconds_ms).ok()?).ok()
}

fn parts<const N: usize>(text: &str, at: char) -> Option<[i64; N]> {
    let numbers: Vec<i64> = text.split(at).map(|p| p.parse::<u32>().map(i64::from)).collect::<Result<_, _>>().ok()?;
    numbers.try_into().ok()
}

fn offset(text: &str) -> Option<i64> {
    if text == "Z" {
        return Some(0);
    }
    let sign = if text.starts_with('-') { -1 } else { 1 };
    let [hours, minutes] = parts(&text[1..], ':')?;
    (hours < 24 && minutes < 60).then_some(sign * (hours * 60 + minutes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> anyhow::Result<Trace> {
        Trace::read(text.as_bytes(), 100)
    }

    fn error(text: &str) -> String {
        format!("{:#}", read(text).expect_err("a bad row"))
    }

    const fn task(at_ms: u64, in_tokens: u64, out_tokens: u64, model: usize) -> Task {
        Task { at_ms, in_tokens, out_tokens, model }
    }

    #[test]
    fn azure_of_both_years() {
        let trace = read(
            "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9799600,4808,10\r\n\
             2023-11-16 18:17:04.0319600,3180,8\r\n",
        );
        let trace = trace.expect("reads");
        assert_eq!(trace.tasks, [task(0, 4808, 10, 0), task(52, 3180, 8, 0)]);
        assert_eq!((trace.models, trace.unanswered), (vec!["default".to_owned()], 0));
        let trace = read(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 02:00:01+02:00,7,6\n",
        );
        assert_eq!(trace.expect("reads").tasks, [task(0, 2162, 5, 0), task(991, 7, 6, 0)]);
    }

    #[test]
    fn burstgpt_of_both_releases() {
        let trace = read(
            "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n\
             45,GPT-4,1087,230,1317,API log\n46,ChatGPT,9,0,9,API log\n",
        );
        let trace = trace.expect("reads");
        assert_eq!(trace.tasks, [task(0, 472, 18, 0), task(40_000, 1087, 230, 1)]);
        assert_eq!((trace.models.join(" "), trace.unanswered), ("ChatGPT GPT-4".into(), 1));
        let trace = read(
            "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n\
             19440161.5,d598,2,ChatGPT,36,29,65,Conversation log\n19440110.0,1722,43,GPT-4,906,446,1352,Conversation log\n",
        );
        // Rows out of order are put in order.
        assert_eq!(trace.expect("reads").tasks, [task(0, 906, 446, 1), task(51_500, 36, 29, 0)]);
    }

    #[test]
    fn a_bad_row_is_named_by_line_and_column() {
        const AZURE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
        let bad = |row: &str| error(&format!("{AZURE}2023-11-16 18:17:03,1,1\n{row}\n"));
        assert!(
            bad("2023-11-16 18:17:03,1,x")
                .starts_with("line 3: column 3 (`GeneratedTokens`): `x` isn't a whole number")
        );
        assert_eq!(bad("2023-11-16 18:17:03,1"), "line 3: column 3 (`GeneratedTokens`) is missing");
        assert_eq!(
            bad("yesterday,1,1"),
            "line 3: column 1 (`TIMESTAMP`): `yesterday` isn't a time like 2023-11-16 18:17:03.9799600"
        );
        assert_eq!(
            bad("2023-11-16 18:17:03,1000001,1"),
            "line 3: column 2 (`ContextTokens`): 1000001 is above 1000000"
        );
        assert!(read(&format!("{AZURE}2023-11-16 18:17:03,1000000,1\n")).is_ok());
        assert!(error("a,b\n1,2\n").starts_with("line 1: the header is neither"));
        assert_eq!(error(""), "line 1: the file is empty");
        assert!(
            error("Timestamp,Model,Request tokens,Response tokens\n-5,m,1,1\n")
                .contains("`-5` isn't a number of seconds")
        );
    }

    #[test]
    fn at_most_so_many_rows_are_read_and_time_can_run_faster() {
        let text =
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1,1\n2023-11-16 18:17:05,1,1\nbroken\n";
        let trace = Trace::read(text.as_bytes(), 2).expect("the third isn't read");
        assert_eq!(trace.faster(4).tasks[1].at_ms, 500);
        assert!(Trace::read(text.as_bytes(), 3).is_err());
    }

    #[test]
    fn dates_are_calendar_dates() {
        assert_eq!(calendar_ms("1970-01-01 00:00:00"), Some(0));
        assert_eq!(calendar_ms("2024-02-29T12:34:56.789Z"), Some(1_709_210_096_789));
        assert_eq!(calendar_ms("2024-13-01 00:00:00"), None);
        assert_eq!(calendar_ms("2024-01-01 24:00:00"), None);
        assert_eq!((decimal_ms("1.0625"), decimal_ms("1."), decimal_ms(".5")), (Some(1_062), Some(1_000), None));
    }
}
