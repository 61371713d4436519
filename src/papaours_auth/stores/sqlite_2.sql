-- Schema 2: whether no foreign key was ever added. One whose journal tells of none may say so.
alter table meta add column minted_only integer not null default 0;

update meta set minted_only = not exists (select 1 from changes where kind = 'key.imported');
