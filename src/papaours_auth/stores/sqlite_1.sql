-- Schema 1. Statements are parted by an empty line. The schema's version is PRAGMA user_version.
-- Times are microseconds since 1970 UTC; grants, networks and attributes are JSON.

create table meta (
    only_row integer primary key check (only_row = 1),
    installation text not null,
    created_at integer not null
);

create table peppers (
    id text primary key,
    proof blob not null,  -- HMAC of the installation under the pepper's check subkey
    status text not null check (status in ('accept', 'primary', 'retired'))
) without rowid;

create table machines (
    id text primary key,
    name text not null,
    organisation text not null,
    status text not null check (status in ('active', 'inactive')),
    created_at integer not null,
    created_by text not null,
    description text not null,
    system integer not null,
    grants text not null,
    attributes text not null
) without rowid;

create table keys (
    id text primary key,
    machine_id text not null references machines (id),
    name text not null,
    environment text not null,
    usage text not null,
    last4 text not null,
    status text not null check (status in ('active', 'inactive')),
    created_at integer not null,
    created_by text not null,
    expires_at integer,
    replaces text,
    networks text not null,
    attributes text not null
) without rowid;

create index machines_by_name on machines (name);

create index keys_by_name on keys (name);

create index keys_of_machine on keys (machine_id);

create table digests (
    digest blob primary key,
    key_id text not null references keys (id),
    pepper_id text not null references peppers (id),
    algorithm text not null
) without rowid;

create index digests_of_key on digests (key_id);

-- Journal, change log and epoch in one: the last row's seq and nonce are the epoch.
create table changes (
    seq integer primary key,
    nonce blob not null,
    at integer not null,
    actor text not null,
    kind text not null,
    subject text not null,
    before text not null,
    after text not null
);

create index changes_of_subject on changes (subject, seq);

create trigger changes_are_kept before delete on changes begin
    select raise(abort, 'the journal is append-only');
end;

create trigger changes_stand before update on changes begin
    select raise(abort, 'the journal is append-only');
end;
