//! What an earlier program would misread, or miss, in a later contract.
//!
//! Additions are welcome: an earlier program skips fields that it does not know, and answers
//! UNIMPLEMENTED to calls. All else is not.

use std::collections::BTreeMap;

use prost_types::descriptor_proto::ReservedRange;
use prost_types::field_descriptor_proto::Label;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    MethodDescriptorProto,
};

/// A contract's parts by their full names.
struct Parts<'a> {
    messages: BTreeMap<String, &'a DescriptorProto>,
    enums: BTreeMap<String, &'a EnumDescriptorProto>,
    methods: BTreeMap<String, &'a MethodDescriptorProto>,
}

impl<'a> Parts<'a> {
    fn of(contract: &'a FileDescriptorSet) -> Self {
        let mut parts =
            Self { messages: BTreeMap::new(), enums: BTreeMap::new(), methods: BTreeMap::new() };
        for file in &contract.file {
            let package = format!(".{}", file.package());
            file.message_type.iter().for_each(|it| parts.add(&package, it));
            for it in &file.enum_type {
                parts.enums.insert(format!("{package}.{}", it.name()), it);
            }
            for service in &file.service {
                for method in &service.method {
                    let name = format!("{package}.{}/{}", service.name(), method.name());
                    parts.methods.insert(name, method);
                }
            }
        }
        parts
    }

    fn add(&mut self, scope: &str, message: &'a DescriptorProto) {
        let name = format!("{scope}.{}", message.name());
        message.nested_type.iter().for_each(|it| self.add(&name, it));
        for it in &message.enum_type {
            self.enums.insert(format!("{name}.{}", it.name()), it);
        }
        self.messages.insert(name, message);
    }
}

/// Everything in `new` that breaks programs built against `old`, each in a sentence.
pub fn breaks(old: &FileDescriptorSet, new: &FileDescriptorSet) -> Vec<String> {
    let (old, new) = (Parts::of(old), Parts::of(new));
    let mut breaks = Vec::new();
    for (name, was) in &old.methods {
        match new.methods.get(name) {
            None => breaks.push(format!("{name} is gone")),
            Some(is) if call(is) != call(was) => {
                breaks.push(format!("{name} was {:?} and is {:?}", call(was), call(is)));
            }
            Some(_) => {}
        }
    }
    for (name, was) in &old.messages {
        match new.messages.get(name) {
            None => breaks.push(format!("{name} is gone")),
            Some(is) => fields(name, was, is, &mut breaks),
        }
    }
    for (name, was) in &old.enums {
        let Some(is) = new.enums.get(name) else {
            breaks.push(format!("{name} is gone"));
            continue;
        };
        for value in &was.value {
            let now = is.value.iter().find(|it| it.number() == value.number());
            if now.map(|it| it.name()) != Some(value.name()) {
                let now = now.map_or("gone", |it| it.name());
                breaks.push(format!(
                    "{name}: {} was {} and is {now}",
                    value.number(),
                    value.name()
                ));
            }
        }
    }
    breaks
}

/// What a call looks like from outside.
fn call(method: &MethodDescriptorProto) -> (&str, bool, &str, bool) {
    let (sent, answered) = (method.client_streaming(), method.server_streaming());
    (method.input_type(), sent, method.output_type(), answered)
}

fn fields(message: &str, was: &DescriptorProto, is: &DescriptorProto, breaks: &mut Vec<String>) {
    for field in &was.field {
        let number = field.number();
        let Some(now) = is.field.iter().find(|it| it.number() == number) else {
            breaks.push(format!("{message}: field {number}, {}, is gone", field.name()));
            continue;
        };
        let (before, after) = (shape(was, field), shape(is, now));
        if before != after {
            breaks.push(format!("{message}: field {number} was {before} and is {after}"));
        }
    }
    for field in &is.field {
        let kept = |range: &ReservedRange| {
            // The end is not part of it.
            (range.start()..range.end()).contains(&field.number())
        };
        let named = was.reserved_name.iter().any(|name| name == field.name());
        if named || was.reserved_range.iter().any(kept) {
            breaks.push(format!("{message}: {} takes what was reserved", field.name()));
        }
    }
}

/// What a field means to who reads it. The name counts: another name is another meaning.
fn shape(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let repeated = if field.label() == Label::Repeated { "repeated " } else { "" };
    let optional = if field.proto3_optional() { "optional " } else { "" };
    let oneof = match field.oneof_index {
        Some(index) if !field.proto3_optional() => {
            format!(" in oneof {}", message.oneof_decl[index as usize].name())
        }
        _ => String::new(),
    };
    let kind = field.r#type().as_str_name().trim_start_matches("TYPE_").to_lowercase();
    let of = field.type_name();
    format!("`{repeated}{optional}{kind} {of} {}{oneof}`", field.name()).replace("  ", " ")
}

#[cfg(test)]
mod tests {
    use prost_types::field_descriptor_proto::Type;

    use super::*;

    fn message<'a>(contract: &'a mut FileDescriptorSet, name: &str) -> &'a mut DescriptorProto {
        let mut all = contract.file.iter_mut().flat_map(|file| &mut file.message_type);
        all.find(|it| it.name() == name).expect("a message of this name")
    }

    type Change<'a> = &'a dyn Fn(&mut FileDescriptorSet);

    /// Each change that must not be made, made.
    #[test]
    fn what_breaks_a_peer_is_found() {
        let old = crate::contract::current();
        assert_eq!(breaks(&old, &old), [""; 0]);
        let broken = |change: Change<'_>| {
            let mut new = old.clone();
            change(&mut new);
            breaks(&old, &new).join("; ")
        };
        let cases: [(Change<'_>, &str); 9] = [
            (
                &|it| message(it, "DrainRequest").field.clear(),
                "DrainRequest: field 1, timeout_ms, is gone",
            ),
            (
                &|it| message(it, "DrainRequest").field[0].set_type(Type::Uint32),
                "field 1 was `uint64 timeout_ms` and is `uint32 timeout_ms`",
            ),
            (
                &|it| message(it, "DrainRequest").field[0].name = Some("timeout_s".into()),
                "was `uint64 timeout_ms` and is `uint64 timeout_s`",
            ),
            (
                &|it| message(it, "DrainRequest").field[0].set_label(Label::Repeated),
                "and is `repeated uint64 timeout_ms`",
            ),
            (
                &|it| message(it, "DrainRequest").field[0].number = Some(2),
                "DrainRequest: field 1, timeout_ms, is gone",
            ),
            (
                &|it| message(it, "DrainRequest").name = Some("Drainage".into()),
                ".baton.v1.DrainRequest is gone",
            ),
            (
                &|it| {
                    let files = it.file.iter_mut().flat_map(|file| &mut file.service);
                    files.for_each(|service| service.method.retain(|it| it.name() != "Undrain"));
                },
                ".baton.v1.Worker/Undrain is gone",
            ),
            (
                &|it| {
                    let services = it.file.iter_mut().flat_map(|file| &mut file.service);
                    for method in services.flat_map(|service| &mut service.method) {
                        method.server_streaming = Some(false);
                    }
                },
                ".baton.v1.Worker/Generate was",
            ),
            (
                &|it| {
                    let enums = it.file.iter_mut().flat_map(|file| &mut file.enum_type);
                    enums.for_each(|it| it.value[1].number = Some(99));
                },
                ".baton.v1.Role: 1 was",
            ),
        ];
        for (change, found) in cases {
            let said = broken(change);
            assert!(said.contains(found), "{found:?} is not in {said:?}");
        }

        // What was kept free stays free; anything else may be added.
        let mut old = old.clone();
        let mut new = old.clone();
        let mut added = message(&mut new, "DrainRequest").field[0].clone();
        (added.name, added.number) = (Some("more".into()), Some(7));
        message(&mut new, "DrainRequest").field.push(added);
        assert_eq!(breaks(&old, &new), [""; 0]);
        let mut range = ReservedRange::default();
        (range.start, range.end) = (Some(7), Some(8));
        message(&mut old, "DrainRequest").reserved_range.push(range);
        let said = breaks(&old, &new).join("; ");
        assert!(said.contains("DrainRequest: more takes what was reserved"), "{said}");
    }
}
