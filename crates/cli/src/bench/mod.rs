//! `uhmm bench`: uhmm against the limits of this machine, measured in the same run.
//!
//! What     [`Row`], one thing that is measured; [`ROWS`], all of them; the table and the JSON.
//! Fails    for a row that does not exist, that was asked for by name and cannot be measured here, or that found wrong
//!          bytes. A goal that is missed is no failure: it is marked.

mod dax;
mod fault;
mod migrate;
mod mirror;
mod pagemap;
mod row;
mod samples;
mod touch;

use serde::Serialize;
use uhmm::{ByteSize, Geometry};

use crate::exit::{End, Failure};
use crate::print;
use migrate::{Way, migrate};
use mirror::Look;
use row::{RowError, Scale};

/// What a row found.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Measure {
    /// The row.
    pub(crate) name: &'static str,
    /// Ours.
    pub(crate) value: f64,
    /// Of both.
    pub(crate) unit: &'static str,
    /// What the machine can do at best, measured in the same run.
    pub(crate) limit: f64,
    /// What that is.
    pub(crate) limit_name: &'static str,
    /// Ours against the limit; higher is better, whatever the unit.
    pub(crate) ratio: f64,
    /// The least that the ratio should be.
    pub(crate) goal: f64,
    /// The most that ours should be, whatever the limit, where the design says so.
    pub(crate) most: Option<f64>,
    /// Whether both are.
    pub(crate) met: bool,
}

impl Measure {
    /// The same, whose own figure should be no more than `most`.
    pub(crate) fn at_most(self, most: f64) -> Self {
        Self { most: Some(most), met: self.met && self.value <= most, ..self }
    }
}

/// One thing that is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    /// As it is called on the command line.
    name: &'static str,
    measure: fn(&'static str, Scale) -> Result<Measure, RowError>,
}

/// Every row.
const ROWS: [Row; 28] = [
    Row { name: "migrate-out-4k", measure: |name, scale| migrate(name, Way::Out, Geometry::K4, scale) },
    Row { name: "migrate-in-4k", measure: |name, scale| migrate(name, Way::In, Geometry::K4, scale) },
    Row { name: "migrate-out-2m", measure: |name, scale| migrate(name, Way::Out, Geometry::M2, scale) },
    Row { name: "migrate-in-2m", measure: |name, scale| migrate(name, Way::In, Geometry::M2, scale) },
    Row { name: "fault-signal", measure: fault::signal },
    Row { name: "fault-threads", measure: fault::threads },
    Row { name: "touch-sequential", measure: touch::sequential },
    Row {
        name: "range-fault-4k",
        measure: |name, scale| mirror::snapshot(name, Geometry::K4, Look::Again, scale),
    },
    Row {
        name: "range-fault-2m",
        measure: |name, scale| mirror::snapshot(name, Geometry::M2, Look::Again, scale),
    },
    Row {
        name: "range-fault-4k-first",
        measure: |name, scale| mirror::snapshot(name, Geometry::K4, Look::First, scale),
    },
    Row {
        name: "range-fault-2m-first",
        measure: |name, scale| mirror::snapshot(name, Geometry::M2, Look::First, scale),
    },
    Row { name: "populate-1g", measure: |name, scale| mirror::populate(name, Look::Again, scale) },
    Row { name: "populate-1g-first", measure: |name, scale| mirror::populate(name, Look::First, scale) },
    Row { name: "pin-4k", measure: mirror::pin },
    Row { name: "pin-4k-first", measure: mirror::pin_first },
    Row { name: "notifier-bracket", measure: mirror::bracket },
    Row { name: "dax-touch-2m", measure: dax::first_touch },
    Row { name: "dax-touch-2m-kernel", measure: dax::first_touch_kernel },
    Row { name: "dax-copy", measure: dax::copy },
    Row { name: "pagemap-register-4k", measure: |name, scale| pagemap::register(name, Geometry::K4, scale) },
    Row { name: "pagemap-register-2m", measure: |name, scale| pagemap::register(name, Geometry::M2, scale) },
    Row { name: "pagemap-register-1g", measure: |name, scale| pagemap::register(name, Geometry::G1, scale) },
    Row {
        name: "descriptor-bytes-2m",
        measure: |name, scale| pagemap::weight(name, Geometry::M2, ByteSize::mib(8), scale),
    },
    Row {
        name: "descriptor-bytes-1g",
        measure: |name, scale| pagemap::weight(name, Geometry::G1, ByteSize::kib(16), scale),
    },
    Row { name: "page-get-put", measure: pagemap::get_and_put },
    Row { name: "page-get-put-2t", measure: pagemap::two_threads },
    Row { name: "pin-2m", measure: pagemap::pin },
    Row { name: "unregister-128g", measure: pagemap::unregister },
];

/// Measures the named rows, or all, and prints.
pub(crate) fn bench(names: &[String], json: bool, quick: bool) -> Result<End, Failure> {
    let scale = if quick { Scale::Quick } else { Scale::Full };
    let known = ROWS.map(|row| row.name);
    if let Some(unknown) = names.iter().find(|name| !known.contains(&name.as_str())) {
        let known = known.join(", ");
        return Err(Failure::usage(format!("there is no row {unknown:?}; the rows are: {known}")));
    }
    let chosen = ROWS.iter().filter(|row| names.is_empty() || names.iter().any(|name| name == row.name));
    let mut found = Vec::new();
    for row in chosen {
        let measure = (row.measure)(row.name, scale);
        if let (Err(why @ RowError::Unavailable(_)), true) = (&measure, names.is_empty()) {
            print::note(&format!("uhmm: {}: {why}", row.name));
            continue;
        }
        let measure = measure.map_err(|why| Failure::Failed(format!("{}: {why}", row.name)))?;
        if !json {
            if found.is_empty() {
                print::line(&heading())?;
            }
            print::line(&line(&measure))?;
        }
        found.push(measure);
    }
    if json {
        print::line(&serde_json::to_string_pretty(&found).map_err(Failure::failed)?)?;
    }
    Ok(End::Done)
}

fn heading() -> String {
    let heads = ["row", "value", "limit", "unit", "ratio", "goal", "most", "met", "the limit is"];
    let [name, value, limit, unit, ratio, goal, most, met, what] = heads;
    format!("{name:20} {value:>10} {limit:>10} {unit:5} {ratio:>6} {goal:>6} {most:>7} {met:4} {what}")
}

fn line(measure: &Measure) -> String {
    let Measure { name, value, unit, limit, limit_name, ratio, goal, most, met } = measure;
    let met = if *met { "yes" } else { "no" };
    let most = most.map_or("-".into(), |most| format!("{most:.2}"));
    format!(
        "{name:20} {value:>10.3} {limit:>10.3} {unit:5} {ratio:>6.2} {goal:>6.2} {most:>7} {met:4} {limit_name}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_moves_the_right_bytes() {
        for row in &ROWS {
            match (row.measure)(row.name, Scale::Quick) {
                Ok(measure) => assert!(measure.value > 0.0 && measure.limit > 0.0, "{measure:?}"),
                Err(RowError::Unavailable(why)) => eprintln!("{} is skipped: {why}", row.name),
                Err(why) => panic!("{}: {why}", row.name),
            }
        }
    }

    #[test]
    fn a_row_that_missed_its_goal_is_marked() {
        let met = Measure {
            name: "row",
            value: 1.5,
            unit: "GB/s",
            limit: 2.0,
            limit_name: "memcpy",
            ratio: 0.75,
            goal: 0.7,
            most: None,
            met: true,
        };
        let missed = Measure { ratio: 0.5, met: false, ..met.clone() };
        assert!(line(&met).contains(" yes ") && line(&missed).contains(" no "));
        assert!(met.clone().at_most(1.5).met && !met.clone().at_most(1.4).met);
        assert!(!missed.at_most(9.0).met, "both are to be reached");
        assert_eq!(serde_json::to_value(&met).unwrap()["limit_name"], "memcpy");
    }
}
