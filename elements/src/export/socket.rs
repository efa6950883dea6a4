//! Who may use an export's socket in the file system.

use crate::nbd::listen::SocketRights;
use blockmason::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// Permission bits, octal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode(u32);

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Mode, String> {
        match u32::from_str_radix(text, 8) {
            Ok(mode) if mode <= 0o777 => Ok(Mode(mode)),
            _ => Err(format!("expected permission bits such as `0660`, found `{text}`")),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

blockmason::text_value!(Mode, "octal permission bits");

/// Owner and group by name or number.
///
/// # Errors
/// There is no such user or group.
pub(super) fn rights(mode: Option<Mode>, owner: Option<&str>, group: Option<&str>) -> Result<SocketRights> {
    Ok(SocketRights {
        mode: mode.map(|mode| mode.0),
        owner: owner.map(|name| id("/etc/passwd", name)).transpose()?,
        group: group.map(|name| id("/etc/group", name)).transpose()?,
    })
}

/// The number of a user or group, from a file of names.
fn id(table: &str, name: &str) -> Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let text = std::fs::read_to_string(table)
        .map_err(|error| Error::io(error, "names cannot be looked up").with_path(table))?;
    let found = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then(|| fields.nth(1)?.parse().ok()).flatten()
    });
    found.ok_or_else(|| Error::invalid(format!("there is no {name:?}")).with_path(table))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_by_name_and_number() {
        assert_eq!(id("/etc/passwd", "root").unwrap(), 0);
        assert_eq!(id("/etc/group", "1234").unwrap(), 1234);
        assert!(id("/etc/passwd", "no such user").is_err());
    }

    #[test]
    fn modes_are_octal() {
        assert_eq!("0660".parse(), Ok(Mode(0o660)));
        assert_eq!(Mode(0o600).to_string(), "0600");
        assert!("0888".parse::<Mode>().is_err() && "1777".parse::<Mode>().is_err());
    }
}
