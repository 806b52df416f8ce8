//! `uhmm doctor`: what this machine and user can do, and what would grant the rest.

use serde::Serialize;
use uhmm_sys::probe::{self, CapabilityRow};

use crate::exit::{End, Failure};
use crate::print;
use crate::run::able;

#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    have: bool,
    detail: &'a str,
    needed_for: &'a str,
    grant: Option<&'a str>,
}

#[derive(Serialize)]
struct Report<'a> {
    kernel: &'a str,
    run_works: bool,
    reason: Option<&'a str>,
    capabilities: Vec<Row<'a>>,
}

/// Asks and prints.
pub(crate) fn doctor(json: bool) -> Result<End, Failure> {
    let found = probe::probe();
    let rows = found.rows();
    let able = able();
    if json {
        let report = Report {
            kernel: &found.kernel,
            run_works: able.is_ok(),
            reason: able.as_ref().err().map(String::as_str),
            capabilities: rows.iter().map(row).collect(),
        };
        print::line(&serde_json::to_string_pretty(&report).map_err(Failure::failed)?)?;
        return Ok(End::Done);
    }
    let width = |of: fn(&CapabilityRow) -> &str| {
        rows.iter().map(|row| of(row).chars().count()).max().unwrap_or(0).min(44)
    };
    let (names, details) = (width(|row| row.name), width(|row| &row.detail));
    let mut text = format!("Linux {}\n", found.kernel);
    for row in &rows {
        let have = if row.have { "have   " } else { "missing" };
        text += &format!("{have}  {:names$}  {:details$}  for {}\n", row.name, row.detail, row.needed_for);
        if let Some(grant) = &row.grant {
            text += &format!("         {:names$}  to grant it: {grant}\n", "");
        }
    }
    text += &match able {
        Ok(()) => "uhmm run works for this user: yes".into(),
        Err(why) => format!("uhmm run works for this user: no, because {why}"),
    };
    print::line(&text)?;
    Ok(End::Done)
}

fn row(row: &CapabilityRow) -> Row<'_> {
    Row {
        name: row.name,
        have: row.have,
        detail: &row.detail,
        needed_for: row.needed_for,
        grant: row.grant.as_deref(),
    }
}
