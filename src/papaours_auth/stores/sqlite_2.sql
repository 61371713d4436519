-- Schema 2: whether no foreign key was ever added. One whose journal tells of none may say so.
alter table meta add column minted_only integer not null default 0;

update meta set minted_only = not exists (select 1 from changes where kind = 'key.imported');

-- A process of schema 1 that has the file open goes on adding keys, and knows nothing of the column.
create trigger foreign_key_is_told_of after insert on changes when new.kind = 'key.imported' begin
    update meta set minted_only = 0;
end;
