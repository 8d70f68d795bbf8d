//! Dates for chat templates, in UTC.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// 1 January 1970 was a Thursday.
const DAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// A directive that is not known here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "strftime_now: %{0} is not supported; known are %Y %y %m %d %e %j %B %b %A %a %H %I %M %S %p %F %T %%, and - against padding"
)]
pub(super) struct UnknownDirective(String);

/// `time` as C's `strftime` writes it.
pub(super) fn strftime(format: &str, time: SystemTime) -> Result<String, UnknownDirective> {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let weekday = DAYS[(days % 7) as usize];
    let month_name = MONTHS[(month - 1) as usize];
    let year_day = days + 1 - days_before(year);

    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = characters.next().unwrap_or_default();
        let unpadded = directive == '-';
        if unpadded {
            directive = characters.next().unwrap_or_default();
        }
        let mut number = |value: u64, width: usize| {
            let width = if unpadded { 0 } else { width };
            // Writing to a string does not fail.
            let _ = write!(out, "{value:0width$}");
        };
        match directive {
            'Y' => number(year, 4),
            'y' => number(year % 100, 2),
            'm' => number(month, 2),
            'd' => number(day, 2),
            'j' => number(year_day, 3),
            'H' => number(hour, 2),
            'I' => number((hour + 11) % 12 + 1, 2),
            'M' => number(minute, 2),
            'S' => number(second, 2),
            'e' => {
                let _ = write!(out, "{day:2}");
            }
            'B' => out.push_str(month_name),
            'b' => out.push_str(&month_name[..3]),
            'A' => out.push_str(weekday),
            'a' => out.push_str(&weekday[..3]),
            'p' => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            'F' => out.push_str(&strftime("%Y-%m-%d", time)?),
            'T' => out.push_str(&strftime("%H:%M:%S", time)?),
            '%' => out.push('%'),
            other => return Err(UnknownDirective(other.to_string())),
        }
    }
    Ok(out)
}

fn leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

/// Days from 1 January 1970 to 1 January of `year`.
fn days_before(year: u64) -> u64 {
    let leaps = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

/// Year, month and day of the month (both from 1) of a day counted from 1 January 1970.
fn date(days: u64) -> (u64, u64, u64) {
    let mut year = 1970 + days / 366;
    while days_before(year + 1) <= days {
        year += 1;
    }
    let mut rest = days - days_before(year);
    let february = if leap(year) { 29 } else { 28 };
    let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    (year, month, rest + 1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64, format: &str) -> String {
        strftime(format, UNIX_EPOCH + Duration::from_secs(seconds)).unwrap()
    }

    /// Expected values are what GNU `date -u -d @SECONDS` prints.
    #[test]
    fn dates_are_the_calendars() {
        assert_eq!(at(0, "%A %d %B %Y %T"), "Thursday 01 January 1970 00:00:00");
        assert_eq!(at(951_782_400, "%F %j %a"), "2000-02-29 060 Tue");
        assert_eq!(at(951_868_799, "%F %T"), "2000-02-29 23:59:59");
        assert_eq!(at(951_868_800, "%F"), "2000-03-01");
        assert_eq!(at(1_767_225_599, "%F %j"), "2025-12-31 365");
        assert_eq!(at(1_767_225_600, "%F %j %b"), "2026-01-01 001 Jan");
        assert_eq!(at(4_107_542_400, "%F"), "2100-03-01");
    }

    #[test]
    fn padding_and_twelve_hours() {
        assert_eq!(at(0, "%-d|%e|%-m|%I %p|%y|100%%"), "1| 1|1|12 AM|70|100%");
        assert_eq!(at(13 * 3600, "%I %p"), "01 PM");
    }

    #[test]
    fn an_unknown_directive_is_named() {
        let error = strftime("%Y %q", UNIX_EPOCH).unwrap_err();
        assert_eq!(error, UnknownDirective("q".to_owned()));
    }
}
